//! `quantization.safetensors`: of each quantised weight `NAME` its codes (`NAME`, I8), their scales (`NAME.scale`, F32
//! `[output channels]`), and the grids of what it is multiplied with (`NAME.input_scale`, F32, and
//! `NAME.input_zero_point`, U8, `[maps, buckets]`); and where buckets begin (`timestep_starts`, F32 `[buckets − 1]`).

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};

use super::{Grid, Layer, Quantization};
use crate::checkpoint::read;
use crate::{Error, Result};

const STARTS: &str = "timestep_starts";
const SCALE: &str = "scale";
const INPUT_SCALE: &str = "input_scale";
const INPUT_ZERO: &str = "input_zero_point";

/// Bytes of the largest file that is read.
const LIMIT: u64 = 16 << 30;

impl Quantization {
    /// As a file.
    ///
    /// # Errors
    /// [`Error::Weights`] where layers are not what they say.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let floats = |values: &mut dyn Iterator<Item = f32>| -> Vec<u8> {
            values.flat_map(f32::to_le_bytes).collect()
        };
        let starts = floats(&mut self.starts.iter().copied());
        let mut tensors = vec![(STARTS.into(), Dtype::F32, vec![self.starts.len()], starts)];
        for (name, layer) in &self.layers {
            let grids = layer.inputs.iter().flatten();
            let shape = vec![layer.inputs.len(), self.starts.len() + 1];
            let codes = layer.codes.iter().map(|code| code.cast_unsigned()).collect();
            tensors.push((name.clone(), Dtype::I8, layer.shape.clone(), codes));
            let scales = floats(&mut layer.scales.iter().copied());
            let of = |part| format!("{name}.{part}");
            tensors.push((of(SCALE), Dtype::F32, vec![layer.scales.len()], scales));
            let scales = floats(&mut grids.clone().map(|grid| grid.scale));
            tensors.push((of(INPUT_SCALE), Dtype::F32, shape.clone(), scales));
            let zeros = grids.map(|grid| grid.zero).collect();
            tensors.push((of(INPUT_ZERO), Dtype::U8, shape, zeros));
        }
        let failed = |error: safetensors::SafeTensorError| Error::Weights(error.to_string());
        let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
            Ok((name, TensorView::new(*dtype, shape.clone(), bytes).map_err(failed)?))
        });
        let views: Vec<_> = views.collect::<Result<_>>()?;
        let metadata = HashMap::from([("scheme".to_owned(), "W8A8".to_owned())]);
        safetensors::serialize(views, Some(metadata)).map_err(failed)
    }

    /// Reads such a file.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Format`] naming the file and what in it is wrong.
    pub fn read(path: &Path) -> Result<Self> {
        let bytes = read::whole(path, LIMIT)?;
        let broken = |problem: String| Error::Format { path: path.to_owned(), problem };
        let whole = |error: safetensors::SafeTensorError| {
            broken(format!("not a whole safetensors file ({error}); quantise the model again"))
        };
        let file = SafeTensors::deserialize(&bytes).map_err(whole)?;
        let tensor = |name: &str, dtype: Dtype| match file.tensor(name) {
            Ok(tensor) if tensor.dtype() == dtype => Ok(tensor),
            Ok(tensor) => Err(broken(format!("`{name}` is {:?}, not {dtype:?}", tensor.dtype()))),
            Err(_) => Err(broken(format!("`{name}` is missing; quantise the model again"))),
        };
        let floats = |name: &str| -> Result<Vec<f32>> {
            let tensor = tensor(name, Dtype::F32)?;
            Ok(tensor.data().as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())
        };
        let scales = |name: &str| -> Result<Vec<f32>> {
            let scales = floats(name)?;
            match scales.iter().find(|scale| !(scale.is_normal() && **scale > 0.0)) {
                None => Ok(scales),
                Some(scale) => {
                    Err(broken(format!("`{name}` holds {scale}; scales are above 0 and finite")))
                }
            }
        };
        let starts = floats(STARTS)?;
        if !starts.is_sorted_by(|a, b| a < b) || starts.iter().any(|start| !start.is_finite()) {
            return Err(broken(format!("`{STARTS}` must be finite and ascending")));
        }
        let mut layers = BTreeMap::new();
        for name in file.names() {
            if !matches!(file.tensor(name), Ok(tensor) if tensor.dtype() == Dtype::I8) {
                continue;
            }
            let codes = tensor(name, Dtype::I8)?;
            let own = scales(&format!("{name}.{SCALE}"))?;
            let (scale, zero) = (format!("{name}.{INPUT_SCALE}"), format!("{name}.{INPUT_ZERO}"));
            let zero = tensor(&zero, Dtype::U8)?;
            let steps = scales(&scale)?;
            let buckets = starts.len() + 1;
            let maps = steps.len() / buckets;
            if maps == 0 || steps.len() != maps * buckets || zero.data().len() != steps.len() {
                return Err(broken(format!("`{name}` must have {buckets} grids for each map")));
            }
            if codes.shape().first() != Some(&own.len()) {
                return Err(broken(format!("`{name}` must have a scale for each output channel")));
            }
            let codes_of: Vec<i8> = codes.data().iter().map(|code| code.cast_signed()).collect();
            if codes_of.contains(&i8::MIN) {
                return Err(broken(format!("`{name}` holds −128; codes are from −127 to 127")));
            }
            let grids = steps.iter().zip(zero.data());
            let grids: Vec<Grid> = grids.map(|(&scale, &zero)| Grid { scale, zero }).collect();
            let layer = Layer {
                shape: codes.shape().to_vec(),
                codes: codes_of,
                scales: own,
                inputs: grids.chunks_exact(buckets).map(<[Grid]>::to_vec).collect(),
            };
            layers.insert(name.to_owned(), layer);
        }
        Ok(Self { starts, layers })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn quantization() -> Quantization {
        let layer = Layer {
            shape: vec![2, 3],
            codes: vec![-127, 0, 127, 1, 2, 3],
            scales: vec![0.5, 0.25],
            inputs: vec![vec![Grid { scale: 0.1, zero: 3 }, Grid { scale: 0.2, zero: 0 }]],
        };
        Quantization { starts: vec![500.0], layers: [("a.weight".to_owned(), layer)].into() }
    }

    #[test]
    fn a_file_is_read_as_it_was_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("q.safetensors");
        std::fs::write(&path, quantization().to_bytes().unwrap()).unwrap();
        assert_eq!(Quantization::read(&path).unwrap(), quantization());
    }

    #[test]
    fn what_is_wrong_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("q.safetensors");
        let problem = |change: &dyn Fn(&mut Quantization)| {
            let mut changed = quantization();
            change(&mut changed);
            std::fs::write(&path, changed.to_bytes().unwrap()).unwrap();
            Quantization::read(&path).unwrap_err().to_string()
        };
        let layer = |it: &mut Quantization| it.layers.get_mut("a.weight").unwrap().clone();
        let with = |it: &mut Quantization, layer| it.layers.insert("a.weight".into(), layer);
        let nan = problem(&|it| it.starts[0] = f32::NAN);
        assert!(nan.contains("timestep_starts"), "{nan}");
        let zero = problem(&|it| {
            let mut changed = layer(it);
            changed.scales[1] = 0.0;
            with(it, changed);
        });
        assert!(zero.contains("`a.weight.scale` holds 0"), "{zero}");
        let low = problem(&|it| {
            let mut changed = layer(it);
            changed.codes[0] = -128;
            with(it, changed);
        });
        assert!(low.contains("holds −128"), "{low}");
        let scales = problem(&|it| {
            let mut changed = layer(it);
            changed.scales.pop();
            with(it, changed);
        });
        assert!(scales.contains("a scale for each output channel"), "{scales}");
        std::fs::write(&path, "no").unwrap();
        let broken = Quantization::read(&path).unwrap_err().to_string();
        assert!(broken.contains("q.safetensors: not a whole safetensors file"), "{broken}");
    }
}
