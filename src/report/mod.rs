//! Is a student good? It is measured beside its teacher, judged in a sentence, and shown on a page.
//!
//! ```text
//! two models ─ comparison ─▶ Comparison ─ verdict ─▶ Verdict
//!                                │                     │
//!                                └── table, page, plots ┘
//! ```

mod comparison;
mod number;
mod page;
mod plots;
mod training;
mod verdict;

pub(crate) use comparison::{Comparison, Settings, Side, compare, deviation, mean, timed_image};
pub(crate) use number::shown;
pub(crate) use page::{how, rows, write};
pub(crate) use training::{COMMAND, Training};
pub(crate) use verdict::{Level, Verdict};
