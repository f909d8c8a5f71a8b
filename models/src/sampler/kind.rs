//! The samplers' names.

use std::fmt;
use std::str::FromStr;

use crate::Error;
use crate::schedule::{Class, ScheduleConfig};

/// A sampler, by the name a request gives it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// `ddpm`: ancestral sampling.
    Ddpm,
    /// `ddim`: deterministic at eta 0, ancestral at eta 1.
    Ddim,
    /// `dpm++`: DPM-Solver++ 2M.
    DpmSolverPlusPlus,
    /// `euler`: first order in sigma.
    Euler,
    /// `heun`: second order in sigma, 2N − 1 evaluations for N steps.
    Heun,
}

impl Kind {
    /// Every sampler.
    pub const ALL: [Self; 5] =
        [Self::Ddpm, Self::Ddim, Self::DpmSolverPlusPlus, Self::Euler, Self::Heun];

    /// The name in requests and model cards.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ddpm => "ddpm",
            Self::Ddim => "ddim",
            Self::DpmSolverPlusPlus => "dpm++",
            Self::Euler => "euler",
            Self::Heun => "heun",
        }
    }

    /// The diffusers class of that name.
    pub fn class(self) -> Class {
        match self {
            Self::Ddpm => Class::Ddpm,
            Self::Ddim => Class::Ddim,
            Self::DpmSolverPlusPlus => Class::DpmSolverMultistep,
            Self::Euler => Class::Euler,
            Self::Heun => Class::Heun,
        }
    }

    /// The sampler of a folder whose card names none: DDIM for DDPM and DDIM folders (a thousand
    /// ancestral steps are nobody's wish), else the one the folder names.
    pub fn for_scheduler_class(config: &ScheduleConfig) -> Self {
        match config.class {
            Class::Ddpm | Class::Ddim => Self::Ddim,
            Class::DpmSolverMultistep => Self::DpmSolverPlusPlus,
            Class::Euler => Self::Euler,
            Class::Heun => Self::Heun,
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Kind {
    type Err = Error;

    /// # Errors
    /// [`Error::Value`] on `scheduler`, with the list of names.
    fn from_str(name: &str) -> Result<Self, Error> {
        Self::ALL.into_iter().find(|kind| kind.name() == name).ok_or_else(|| {
            let names = Self::ALL.map(Self::name).join(", ");
            Error::value("scheduler", format!("{name:?}"), format!("use one of {names}"))
        })
    }
}
