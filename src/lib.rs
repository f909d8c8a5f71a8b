//! The server.
pub mod engine;
pub mod metrics;
pub mod registry;
