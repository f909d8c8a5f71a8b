//! A network that is always asked about equally many rows.

use candle_core::{DType, Device, Result, Tensor};

use crate::denoiser::{Conditions, Denoiser, Geometry};

/// Asks its network about `rows` rows whatever it is asked itself, the missing ones zeros at time 0, and more than
/// that in several evaluations. Shapes, types and errors are the network's.
///
/// A GPU's libraries choose algorithms, and with them the order of sums, by the size of the batch, and some by what is
/// fastest just now; here there is but one size, and the network is pinned ([`Denoiser::pin`]).
pub struct FixedBatch {
    network: Box<dyn Denoiser>,
    rows: usize,
}

impl FixedBatch {
    /// Around a network; 0 rows count as 1.
    pub fn new(mut network: Box<dyn Denoiser>, rows: usize) -> Self {
        network.pin();
        Self { network, rows: rows.max(1) }
    }
}

impl Denoiser for FixedBatch {
    fn forward(
        &self,
        x: &Tensor,
        timesteps: &Tensor,
        condition: Option<&Tensor>,
    ) -> Result<Tensor> {
        self.evaluate(x, timesteps, Conditions::of(condition))
    }

    fn evaluate(&self, x: &Tensor, timesteps: &Tensor, conditions: Conditions) -> Result<Tensor> {
        let batch = x.dim(0)?;
        let mut answers = Vec::new();
        for first in (0..batch).step_by(self.rows) {
            let taken = self.rows.min(batch - first);
            let padded = |tensor: &Tensor| {
                tensor.narrow(0, first, taken)?.pad_with_zeros(0, 0, self.rows - taken)
            };
            let all = [conditions.condition, conditions.prompt, conditions.guidance];
            let mut parts = Vec::new();
            for one in all {
                parts.push(one.map(padded).transpose()?);
            }
            let conditions = Conditions {
                condition: parts[0].as_ref(),
                prompt: parts[1].as_ref(),
                guidance: parts[2].as_ref(),
            };
            let answer = self.network.evaluate(&padded(x)?, &padded(timesteps)?, conditions)?;
            answers.push(answer.narrow(0, 0, taken)?);
        }
        Tensor::cat(&answers, 0)
    }

    fn at(&self, size: [usize; 2], tokens: usize) -> Option<crate::Result<Box<dyn Denoiser>>> {
        let other = self.network.at(size, tokens)?;
        Some(other.map(|network| Box::new(Self::new(network, self.rows)) as Box<dyn Denoiser>))
    }

    fn geometry(&self) -> &Geometry {
        self.network.geometry()
    }

    fn dtype(&self) -> DType {
        self.network.dtype()
    }

    fn device(&self) -> &Device {
        self.network.device()
    }

    fn parameters(&self) -> usize {
        self.network.parameters()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::denoiser::Conditioning;

    /// Answers x + t + class, and remembers how many rows it was asked about.
    struct Sum {
        geometry: Geometry,
        asked: Arc<Mutex<Vec<usize>>>,
    }

    impl Denoiser for Sum {
        fn forward(&self, x: &Tensor, times: &Tensor, classes: Option<&Tensor>) -> Result<Tensor> {
            self.geometry.check(DType::F32, x, times, Conditions::of(classes))?;
            self.asked.lock().unwrap().push(x.dim(0)?);
            let classes = classes.unwrap().to_dtype(DType::F32)?;
            x.broadcast_add(&(times + classes)?.reshape(((), 1, 1, 1))?)
        }

        fn geometry(&self) -> &Geometry {
            &self.geometry
        }

        fn dtype(&self) -> DType {
            DType::F32
        }

        fn device(&self) -> &Device {
            &Device::Cpu
        }

        fn parameters(&self) -> usize {
            0
        }
    }

    #[test]
    fn every_evaluation_has_as_many_rows_and_answers_are_those_without() {
        let asked = Arc::new(Mutex::new(Vec::new()));
        let geometry = Geometry {
            in_channels: 1,
            out_channels: 1,
            height: 2,
            width: 2,
            conditioning: Conditioning::Classes(10),
            prompt: None,
            guidance: false,
        };
        let sum = || Sum { geometry: geometry.clone(), asked: Arc::clone(&asked) };
        let (plain, padded) = (sum(), FixedBatch::new(Box::new(sum()), 4));
        for batch in [1, 3, 4, 9] {
            let x = Tensor::arange(0.0, batch as f32 * 4.0, &Device::Cpu).unwrap();
            let x = x.reshape((batch, 1, 2, 2)).unwrap();
            let times = Tensor::arange(0.0, batch as f32, &Device::Cpu).unwrap();
            let classes = Tensor::arange(0, batch as u32, &Device::Cpu).unwrap();
            let expected = plain.forward(&x, &times, Some(&classes)).unwrap();
            asked.lock().unwrap().clear();
            let answer = padded.forward(&x, &times, Some(&classes)).unwrap();
            assert_eq!(*asked.lock().unwrap(), vec![4; batch.div_ceil(4)]);
            let values = |tensor: Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert_eq!(values(answer), values(expected));
        }
    }
}
