//! Messages of gRPC, generated from the protocol files beside this one by `tools/protobuf`.
#![allow(missing_docs, unreachable_pub, clippy::all)]

#[rustfmt::skip]
pub mod health;
#[rustfmt::skip]
pub mod open_inference;
