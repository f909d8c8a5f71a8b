//! Weights as steps read them: as they are, or, where the network is trained, anew in every evaluation.

use std::collections::BTreeSet;

use candle_core::{Result, Shape, Tensor};

use super::builder::ALIGNED;
use super::context::Context;
use super::lists::join_at;

/// A weight or a vector of a layer, or several that are one to it.
#[derive(Clone)]
pub(super) enum Parameter {
    /// It does not change.
    Own(Tensor),
    /// From trained tensor `first` on, one after another.
    Trained { first: usize, shape: Shape, form: Form },
}

/// How a trained parameter is read.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// In f32.
    Vector,
    /// In the network's type.
    Matrix,
    /// In the network's type, `[outputs, 3, 3, inputs]` of `[outputs, inputs, 3, 3]`.
    Filter,
}

/// The tensors that a network is trained by, f32, in the order in which their gradients lie.
#[derive(Default)]
pub(super) struct Trained {
    pub(super) tensors: Vec<Tensor>,
    /// Those that are read turned.
    pub(super) filters: Vec<Parameter>,
    /// Numbers of tensors that are one parameter with the one before.
    followers: BTreeSet<usize>,
}

impl Trained {
    /// Notes tensors that are one parameter.
    pub(super) fn register(
        &mut self,
        tensors: impl IntoIterator<Item = Tensor>,
        shape: impl Into<Shape>,
        form: Form,
    ) -> Parameter {
        let first = self.tensors.len();
        let parameter = Parameter::Trained { first, shape: shape.into(), form };
        self.tensors.extend(tensors);
        self.followers.extend(first + 1..self.tensors.len());
        if form == Form::Filter {
            self.filters.push(parameter.clone());
        }
        parameter
    }

    /// Where each tensor begins among all, and after them their end. Those that are one parameter follow each other; what
    /// multiplies matrices reads several numbers at once, so others begin at multiples of these.
    pub(super) fn starts(&self) -> Vec<usize> {
        let (mut all, mut end) = (vec![0], 0usize);
        for (number, tensor) in self.tensors.iter().enumerate() {
            end += tensor.elem_count();
            if !self.followers.contains(&(number + 1)) {
                end = end.next_multiple_of(ALIGNED);
            }
            all.push(end);
        }
        all
    }
}

/// The trained tensors as they are in one evaluation, each form of all of them in one vector.
pub(super) struct Current {
    flat: Tensor,
    typed: Tensor,
    turned: Tensor,
}

impl Current {
    /// # Errors
    /// Whatever the device says.
    pub(super) fn new(
        context: &Context,
        tensors: &[Tensor],
        filters: &[Parameter],
        starts: &[usize],
    ) -> Result<Self> {
        let flat = join_at(tensors, starts)?;
        let typed = flat.to_dtype(context.dtype)?;
        let turned = context.empty(flat.shape(), context.dtype)?;
        let current = Self { flat, typed, turned };
        for filter in filters {
            let Parameter::Trained { first, shape, .. } = filter else { continue };
            let (_, tall, wide, inputs) = shape.dims4()?;
            let layout = [starts[*first], inputs * tall * wide];
            context.import(&current.typed, layout, (1.0, 0.0), &current.get(filter, starts)?)?;
        }
        Ok(current)
    }

    /// A parameter as it is now.
    pub(super) fn get(&self, parameter: &Parameter, starts: &[usize]) -> Result<Tensor> {
        match parameter {
            Parameter::Own(tensor) => Ok(tensor.clone()),
            Parameter::Trained { first, shape, form } => {
                let all = match form {
                    Form::Vector => &self.flat,
                    Form::Matrix => &self.typed,
                    Form::Filter => &self.turned,
                };
                part(all, starts[*first], shape)
            }
        }
    }
}

/// What lies in a vector from `start` on.
pub(super) fn part(all: &Tensor, start: usize, shape: &Shape) -> Result<Tensor> {
    all.narrow(0, start, shape.elem_count())?.reshape(shape)
}
