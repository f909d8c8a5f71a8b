//! What a network is told of a prompt: the states of CLIP's text encoder, of two of these, of T5's, or of all three.

use std::{sync::Arc, time::Duration};

use candle_core::Device;

use super::{
    clip::ClipEncoder,
    clips::{self, PromptStates, Second},
    joint::Joint,
    t5::T5Encoder,
};
use crate::Result;

/// The text encoders of a model.
pub struct PromptEncoder(Kind);

enum Kind {
    Clip { first: Box<ClipEncoder>, second: Option<Box<Second>> },
    T5 { encoder: Arc<T5Encoder>, most: usize },
    Joint(Box<Joint>),
}

impl PromptEncoder {
    /// Of one encoder of CLIP's, whose last states are told, after its last norm.
    pub fn clip(encoder: ClipEncoder) -> Self {
        Self(Kind::Clip { first: Box::new(encoder), second: None })
    }

    /// Of two encoders of as many tokens, whose states before their last layers are told side by side, and what the second one
    /// pools. `pad` fills the second one's prompts up.
    pub fn two_clips(first: ClipEncoder, encoder: ClipEncoder, pad: u32) -> Self {
        let second = Some(Box::new(Second { encoder, pad }));
        Self(Kind::Clip { first: Box::new(first), second })
    }

    /// Of T5's encoder, for prompts of at most so many tokens.
    pub fn t5(encoder: T5Encoder, most: usize) -> Self {
        Self(Kind::T5 { encoder: Arc::new(encoder), most })
    }

    /// Of two encoders of CLIP's as [`PromptEncoder::two_clips`] takes them, whose states are told with zeros to `width`
    /// numbers, and of T5's behind them, as wide; without it there are zeros. What both of CLIP's pool is told side by side.
    pub fn joint(
        first: ClipEncoder,
        (encoder, pad): (ClipEncoder, u32),
        t5: Option<T5Encoder>,
        width: usize,
    ) -> Self {
        Self(Kind::Joint(Box::new(Joint::new(first, Second { encoder, pad }, t5, width))))
    }

    /// What becomes of prompts, each of which is its tokens: of CLIP's one or several times [`PromptEncoder::tokens`], each part
    /// with a beginning and an end, whose states stand one behind the other, while what is pooled is the first part's; of T5's
    /// at most that many, its end among them; of both together exactly that many.
    ///
    /// On the CPU a prompt's states depend, to the bit, only on its own tokens.
    ///
    /// # Errors
    /// As [`ClipEncoder::forward`] and [`T5Encoder::forward`].
    pub fn read(&self, prompts: &[&[u32]]) -> Result<Vec<PromptStates>> {
        match &self.0 {
            Kind::Clip { first, second } => clips::read(first, second.as_deref(), prompts),
            Kind::T5 { encoder, .. } => {
                let read = |prompt: &&[u32]| {
                    let states = encoder.forward(prompt)?.to_device(&Device::Cpu)?;
                    Ok(PromptStates { states, pooled: Vec::new() })
                };
                prompts.iter().map(read).collect()
            }
            Kind::Joint(joint) => joint.read(prompts),
        }
    }

    /// Tokens of a prompt, those that begin and end it among them: of CLIP's each part has as many, of T5's a prompt at most.
    pub fn tokens(&self) -> usize {
        match &self.0 {
            Kind::Clip { first, .. } => first.config().tokens(),
            Kind::T5 { most, .. } => *most,
            Kind::Joint(joint) => joint.tokens(),
        }
    }

    /// Number of weights, also of an encoder that is not in memory now.
    pub fn parameters(&self) -> usize {
        match &self.0 {
            Kind::Clip { first, second } => {
                let second = second.as_ref().map_or(0, |second| second.parameters());
                first.parameters() + second
            }
            Kind::T5 { encoder, .. } => encoder.config().parameters(),
            Kind::Joint(joint) => joint.parameters(),
        }
    }

    /// Whether weights are read when it is first asked, and may be forgotten until the next time: those of T5's are.
    pub fn is_lazy(&self) -> bool {
        match &self.0 {
            Kind::Clip { .. } => false,
            Kind::T5 { .. } => true,
            Kind::Joint(joint) => joint.is_lazy(),
        }
    }

    /// Has the other's encoder of T5's kind for its own, where both have one of the same weights: it is too large to be there
    /// twice.
    pub fn share(&mut self, other: &Self) {
        match (&mut self.0, &other.0) {
            (Kind::T5 { encoder, .. }, Kind::T5 { encoder: other, .. }) => {
                encoder.clone_from(other);
            }
            (Kind::Joint(joint), Kind::Joint(other)) => joint.share(other),
            _ => {}
        }
    }

    /// Reads the weights, if they are not in memory.
    ///
    /// # Errors
    /// As [`T5Encoder::forward`].
    pub fn load(&self) -> Result<()> {
        match &self.0 {
            Kind::Clip { .. } => Ok(()),
            Kind::T5 { encoder, .. } => encoder.load(),
            Kind::Joint(joint) => joint.load(),
        }
    }

    /// Forgets weights that can be read again and were not used for so long; whether there were some. Waits for nobody.
    pub fn unload_if_idle(&self, idle: Duration) -> bool {
        match &self.0 {
            Kind::Clip { .. } => false,
            Kind::T5 { encoder, .. } => encoder.unload_if_idle(idle),
            Kind::Joint(joint) => joint.unload_if_idle(idle),
        }
    }
}
