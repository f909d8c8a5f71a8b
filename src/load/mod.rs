//! Offers a running server load, and tells what became of it.
//!
//! The loop is open: requests are sent when a Poisson process says so, whatever has become of the
//! earlier ones, as strangers do. A latency counts from when its request was *due*, so a server that
//! stalls is charged for everybody who would have come meanwhile, and so is a client that is late itself
//! ("coordinated omission": Tene, "How not to measure latency", 2013).
//!
//! ```text
//! mix       which models, by weight
//! arrivals  when each request is due, and for which of them
//! open_loop sends them, over a bounded number of connections
//! client    one request over HTTP, and its answer
//! recorder  answers → figures of a run
//! report    runs → table, JSON, CSV
//! plot      runs → SVG
//! ```

mod arrivals;
mod client;
mod mix;
mod open_loop;
mod plot;
mod recorder;
mod report;

pub use arrivals::{Arrival, arrivals, poisson, uniform};
pub use client::{Client, Served};
pub use mix::Mix;
pub use open_loop::{Answer, Outcome, open_loop};
pub use plot::svg;
pub use recorder::{Figures, Percentiles, Recorder, Run};
pub use report::{Asked, Report};
