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
    /// `pndm`: pseudo linear multistep, N + 1 evaluations for N > 1 steps.
    Pndm,
    /// `dpm++`: DPM-Solver++ 2M.
    DpmSolverPlusPlus,
    /// `euler`: first order in sigma.
    Euler,
    /// `euler-ancestral`: the same with fresh noise at each step.
    EulerAncestral,
    /// `heun`: second order in sigma, 2N − 1 evaluations for N steps.
    Heun,
    /// `lcm`: of latent consistency models.
    Lcm,
    /// `tcd`: of trajectory consistency models; deterministic at eta 0.
    Tcd,
    /// `flow-euler`: first order, of networks trained by flow matching.
    FlowEuler,
}

impl Kind {
    /// Every sampler.
    pub const ALL: [Self; 10] = [
        Self::Ddpm,
        Self::Ddim,
        Self::DpmSolverPlusPlus,
        Self::Euler,
        Self::Heun,
        Self::Pndm,
        Self::EulerAncestral,
        Self::Lcm,
        Self::Tcd,
        Self::FlowEuler,
    ];

    /// The name in requests and model cards.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ddpm => "ddpm",
            Self::Ddim => "ddim",
            Self::Pndm => "pndm",
            Self::DpmSolverPlusPlus => "dpm++",
            Self::Euler => "euler",
            Self::EulerAncestral => "euler-ancestral",
            Self::Heun => "heun",
            Self::Lcm => "lcm",
            Self::Tcd => "tcd",
            Self::FlowEuler => "flow-euler",
        }
    }

    /// The diffusers class of that name.
    pub fn class(self) -> Class {
        match self {
            Self::Ddpm => Class::Ddpm,
            Self::Ddim => Class::Ddim,
            Self::Pndm => Class::Pndm,
            Self::DpmSolverPlusPlus => Class::DpmSolverMultistep,
            Self::Euler => Class::Euler,
            Self::EulerAncestral => Class::EulerAncestral,
            Self::Heun => Class::Heun,
            Self::Lcm => Class::Lcm,
            Self::Tcd => Class::Tcd,
            Self::FlowEuler => Class::FlowMatchEuler,
        }
    }

    /// The eta that diffusers takes where nobody says: TCD adds noise, DDIM none.
    pub fn default_eta(self) -> f64 {
        if self == Self::Tcd { 0.3 } else { 0.0 }
    }

    /// The sampler of a folder whose card names none: DDIM for DDPM and DDIM folders (a thousand
    /// ancestral steps are nobody's wish), else the one the folder names.
    pub fn for_scheduler_class(config: &ScheduleConfig) -> Self {
        match config.class {
            Class::Ddpm | Class::Ddim => Self::Ddim,
            Class::Pndm => Self::Pndm,
            Class::DpmSolverMultistep => Self::DpmSolverPlusPlus,
            Class::Euler => Self::Euler,
            Class::EulerAncestral => Self::EulerAncestral,
            Class::Heun => Self::Heun,
            Class::Lcm => Self::Lcm,
            Class::Tcd => Self::Tcd,
            Class::FlowMatchEuler => Self::FlowEuler,
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
