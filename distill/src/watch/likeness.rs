//! How like the student's images are to the teacher's: what tells that distribution matching goes astray.
//!
//! A critic that cannot follow lets images become too bright or too strong, class by class; a student that draws less than
//! its teacher loses recall. Both sets are of the same seeds and classes, and as small as they are the figures compare with
//! those of other steps of the run, and with nothing else.

use candle_core::{DType, Device, Result, Tensor};
use serde::Serialize;

use crate::evaluate::precision_and_recall;

/// The figures of two sets of images.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Likeness {
    /// By class; one without a class of networks without.
    pub classes: Vec<Moments>,
    /// Share of the student's images that are among the teacher's, by their pixels (Kynkäänniemi et al. 2019), 0 to 1.
    pub precision: f64,
    /// Share of the teacher's that are among the student's.
    pub recall: f64,
}

/// Mean and deviation of all values of a class's images: −1 is black and 1 white.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Moments {
    /// Which.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub class: Option<u32>,
    /// The student's mean.
    pub mean: f64,
    /// The teacher's.
    pub teacher_mean: f64,
    /// The student's deviation.
    pub deviation: f64,
    /// The teacher's.
    pub teacher_deviation: f64,
}

/// Fewest images of a set: balls around images reach to the third neighbour.
const LEAST: usize = 4;

impl Likeness {
    /// Of images f32 `[N, C, H, W]` of the student and of the teacher, in the same order of `labels`; nothing of fewer than
    /// four.
    ///
    /// # Errors
    /// Whatever the device says.
    pub fn new(student: &Tensor, teacher: &Tensor, labels: &[Option<u32>]) -> Result<Option<Self>> {
        if labels.len() < LEAST {
            return Ok(None);
        }
        let flat =
            |images: &Tensor| images.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.flatten_from(1);
        let (student, teacher) = (flat(student)?, flat(teacher)?);
        let (precision, recall) = precision_and_recall(&student, &teacher)?;
        let mut names = labels.to_vec();
        names.sort_unstable();
        names.dedup();
        let rows = |images: &Tensor, class: Option<u32>| -> Result<(f64, f64)> {
            let own = labels.iter().enumerate().filter(|(_, label)| **label == class);
            let own: Vec<u32> = own.map(|(row, _)| row as u32).collect();
            let values = images.index_select(&Tensor::new(own, &Device::Cpu)?, 0)?;
            let mean = values.mean_all()?.to_scalar::<f64>()?;
            let square = (values - mean)?.sqr()?.mean_all()?.to_scalar::<f64>()?;
            Ok((mean, square.sqrt()))
        };
        let moments = |class: Option<u32>| -> Result<Moments> {
            let ((mean, deviation), (teacher_mean, teacher_deviation)) =
                (rows(&student, class)?, rows(&teacher, class)?);
            Ok(Moments { class, mean, teacher_mean, deviation, teacher_deviation })
        };
        let classes = names.into_iter().map(moments).collect::<Result<_>>()?;
        Ok(Some(Self { classes, precision, recall }))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn what_is_brighter_and_what_is_all_the_same_is_told() {
        let images = |values: &[f32]| {
            Tensor::from_slice(values, (values.len() / 2, 1, 1, 2), &Device::Cpu).unwrap()
        };
        let labels = [Some(0), Some(1), Some(0), Some(1), Some(1)];
        let teacher = [0.0, 0.2, -1.0, -0.8, 0.1, 0.3, -0.4, 0.4, 1.0, 0.9];
        let brighter: Vec<f32> = teacher.iter().map(|value| value + 0.5).collect();
        let same = Likeness::new(&images(&teacher), &images(&teacher), &labels).unwrap().unwrap();
        assert_eq!((same.precision, same.recall), (1.0, 1.0));
        let told = Likeness::new(&images(&brighter), &images(&teacher), &labels).unwrap().unwrap();
        assert_eq!(told.classes.len(), 2);
        for moments in &told.classes {
            assert!((moments.mean - moments.teacher_mean - 0.5).abs() < 1e-6, "{moments:?}");
            assert!((moments.deviation - moments.teacher_deviation).abs() < 1e-6, "{moments:?}");
        }
        assert!((told.classes[0].teacher_mean - 0.15).abs() < 1e-6, "{told:?}");
        let alike = [0.2_f32; 10];
        let told = Likeness::new(&images(&alike), &images(&teacher), &labels).unwrap().unwrap();
        assert_eq!((told.precision, told.recall), (1.0, 0.0), "{told:?}");
        assert_eq!(told.classes[1].deviation, 0.0);
        let few = images(&teacher[..6]);
        assert!(Likeness::new(&few, &few, &labels[..3]).unwrap().is_none());
    }
}
