//! The words a scheduler configuration may use.

/// What reading a field needs to know of an enum of words.
pub(super) trait Word: Copy + 'static {
    fn all() -> &'static [Self];
    fn word(self) -> &'static str;
    fn parse(word: &str) -> Option<Self>;
}

/// An enum whose variants have the names that diffusers' files use.
macro_rules! named {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $text:literal,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum $name {
            $($(#[$variant_doc])* $variant,)*
        }

        impl $name {
            /// Every value, in the order of the documentation.
            pub const ALL: &[Self] = &[$(Self::$variant),*];

            /// The name in a file.
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $text,)*
                }
            }

            /// The value of that name.
            pub fn from_name(name: &str) -> Option<Self> {
                Self::ALL.iter().copied().find(|value| value.name() == name)
            }
        }

        impl Word for $name {
            fn all() -> &'static [Self] {
                Self::ALL
            }

            fn word(self) -> &'static str {
                self.name()
            }

            fn parse(word: &str) -> Option<Self> {
                Self::from_name(word)
            }
        }
    };
}

named! {
    /// The diffusers scheduler classes a folder may name.
    Class {
        /// Ancestral sampling (Ho et al. 2020, arXiv 2006.11239).
        Ddpm = "DDPMScheduler",
        /// Non-Markovian sampling (Song et al. 2020, arXiv 2010.02502).
        Ddim = "DDIMScheduler",
        /// Pseudo linear multistep sampling (Liu et al. 2022, arXiv 2202.09778).
        Pndm = "PNDMScheduler",
        /// DPM-Solver++ 2M (Lu et al. 2022, arXiv 2211.01095).
        DpmSolverMultistep = "DPMSolverMultistepScheduler",
        /// Euler's method in sigma (Karras et al. 2022, arXiv 2206.00364).
        Euler = "EulerDiscreteScheduler",
        /// The same with fresh noise at each step.
        EulerAncestral = "EulerAncestralDiscreteScheduler",
        /// Heun's method in sigma (Karras et al. 2022, Algorithm 1).
        Heun = "HeunDiscreteScheduler",
        /// Latent consistency models (Luo et al. 2023, arXiv 2310.04378).
        Lcm = "LCMScheduler",
        /// Trajectory consistency models (Zheng et al. 2024, arXiv 2402.19159).
        Tcd = "TCDScheduler",
        /// Flow matching (Esser et al. 2024, arXiv 2403.03206).
        FlowMatchEuler = "FlowMatchEulerDiscreteScheduler",
    }
}

named! {
    /// How betas go from the first timestep to the last.
    BetaSchedule {
        /// Equal steps (Ho et al. 2020).
        Linear = "linear",
        /// Equal steps of the square root (Rombach et al. 2022).
        ScaledLinear = "scaled_linear",
        /// From a squared-cosine alpha_bar, betas capped at 0.999 (Nichol & Dhariwal 2021, eq. 17).
        SquaredCosine = "squaredcos_cap_v2",
        /// A sigmoid from −6 to 6 (GeoDiff, Xu et al. 2022).
        Sigmoid = "sigmoid",
    }
}

named! {
    /// What the network predicts.
    PredictionType {
        /// The noise `eps`.
        Epsilon = "epsilon",
        /// The clean sample `x0`.
        Sample = "sample",
        /// The velocity `sqrt(alpha_bar)·eps − sqrt(1 − alpha_bar)·x0` (Salimans & Ho 2022).
        Velocity = "v_prediction",
    }
}

named! {
    /// The variance of an ancestral step.
    VarianceType {
        /// The posterior variance (Ho et al. 2020, eq. 7).
        FixedSmall = "fixed_small",
        /// The same.
        FixedSmallLog = "fixed_small_log",
        /// `beta_t`.
        FixedLarge = "fixed_large",
        /// The same; diffusers takes the square root of a negative logarithm here and makes NaN.
        FixedLargeLog = "fixed_large_log",
        /// The network tells it.
        Learned = "learned",
        /// The network interpolates between the posterior variance and `beta_t` (Nichol & Dhariwal
        /// 2021, eq. 15).
        LearnedRange = "learned_range",
    }
}

named! {
    /// Which training timesteps a shorter trajectory visits (Lin et al. 2023, arXiv 2305.08891, Table 2).
    TimestepSpacing {
        /// Multiples of `num_train_timesteps / steps`, from 0.
        Leading = "leading",
        /// The same distance, ending at the last timestep.
        Trailing = "trailing",
        /// From the first to the last, both included.
        Linspace = "linspace",
    }
}

named! {
    /// The form of DPM-Solver++'s second-order step.
    SolverType {
        /// Midpoint (Lu et al. 2022, Algorithm 2).
        Midpoint = "midpoint",
        /// Heun.
        Heun = "heun",
    }
}

named! {
    /// Where the last step ends.
    FinalSigmas {
        /// At the clean sample.
        Zero = "zero",
        /// At the training schedule's first timestep.
        SigmaMin = "sigma_min",
    }
}
