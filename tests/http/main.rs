//! The server from outside: requests in, replies out, over tiny networks with random weights.
#![allow(clippy::unwrap_used)]

#[path = "../common/folder.rs"]
mod folder;
#[path = "../common/stable_diffusion_3.rs"]
mod stable_diffusion_3;

mod access;
mod auto;
mod compare;
mod connections;
mod draft;
mod edits;
mod experiments;
mod few_steps;
mod grpc;
mod http2;
mod images;
mod inference;
mod lifecycle;
mod load;
mod lora;
mod models;
mod openapi;
mod page;
mod pixart;
mod refusals;
mod rollout;
mod sd3;
mod server;
mod shadow;
mod streaming;
mod text;
mod traces;
mod votes;
mod webui;
mod xl;
