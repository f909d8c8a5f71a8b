//! x

pub mod adm;
