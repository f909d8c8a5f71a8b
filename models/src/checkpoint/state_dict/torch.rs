//! Files of `torch.save`: a ZIP of one pickle, which describes the tensors, and of their bytes.

use std::{
    cell::RefCell,
    collections::HashMap,
    fs::File,
    io::{self, BufReader, Read},
    path::{Path, PathBuf},
    rc::Rc,
};

use candle_core::{DType, Device, Tensor};
use zip::ZipArchive;

use super::{
    Candidate,
    pickle::{self, Id, Object, Pickle},
};
use crate::{
    Error, Result,
    checkpoint::{
        read,
        tensors::{NOT_FINITE, all_finite},
    },
    weight::Weight,
};

/// Dicts are looked for so deep inside of others: `{"state": {"model": {…}}}`.
const DEPTH: usize = 4;
/// Most dicts that are looked at, however they lie in each other.
const DICTS: usize = 10_000;
/// Most tensors in all of them, where one may lie in several; bytes of a name; and sides of a tensor. What is described once in a pickle
/// may be named there as often as one likes, so what is copied for each name has its bounds.
const TENSORS: usize = 100_000;
const NAME: usize = 512;
const SIDES: usize = 32;
/// Letters of a name that are told.
const TOLD: usize = 60;

/// The dicts of tensors in a file, and what else it holds.
pub(super) struct Found {
    pub(super) candidates: Vec<Candidate>,
    /// Where there are no tensors, what there is instead.
    pub(super) instead: String,
}

/// Reads the pickle; tensors stay in the file until they are asked for.
///
/// # Errors
/// [`Error::Io`], [`Error::Format`] naming the file and what is wrong.
pub(super) fn open(path: &Path) -> Result<Found> {
    let refuse = |problem: String| Error::Format { path: path.to_owned(), problem };
    let (file, length) = read::open(path)?;
    // Besides damaged files these are, rarely, whole ones: the zip crate mistakes the directory of an archive whose
    // inner folder has a name of 21 characters.
    let remedy = "if PyTorch can load it, save it again with torch.save, under another name";
    let broken = |problem: &dyn std::fmt::Display| refuse(format!("{problem}; {remedy}"));
    let mut archive = ZipArchive::new(BufReader::new(file)).map_err(|error| broken(&error))?;
    let names: Vec<String> =
        archive.file_names().filter_map(|name| Some(name.ok()?.into_owned())).collect();
    let inner = names.iter().find_map(|name| {
        let folder = name.strip_suffix("data.pkl")?;
        (folder.is_empty() || folder.ends_with('/')).then(|| folder.to_owned())
    });
    let inner = inner.ok_or_else(|| broken(&"no data.pkl inside"))?;
    if names.iter().any(|name| name.strip_prefix(&inner) == Some("constants.pkl")) {
        let problem = "is a TorchScript program, not a state dict; load it with torch.jit.load and \
                       torch.save its state_dict()";
        return Err(refuse(problem.into()));
    }
    if let Ok(order) = archive.by_name(&format!("{inner}byteorder"))
        && read::to_end(order, 16).is_ok_and(|order| order == b"big")
    {
        return Err(refuse("was saved on a big-endian machine; save it again on another".into()));
    }
    let pickled = archive.by_name(&format!("{inner}data.pkl")).map_err(|error| broken(&error))?;
    let pickled = read::to_end(pickled, pickle::BYTES).map_err(|error| broken(&error))?;
    let pickle = Pickle::read(&pickled).map_err(|problem| broken(&problem))?;
    let source = Source {
        path: path.to_owned(),
        length,
        folder: format!("{inner}data/"),
        archive: Rc::new(RefCell::new(archive)),
    };
    let mut candidates = Vec::new();
    gather(&pickle, pickle.root, &source, &mut candidates).map_err(refuse)?;
    Ok(Found { candidates, instead: describe(&pickle) })
}

/// Every dict below `root` that holds tensors.
fn gather(
    pickle: &Pickle<'_>,
    root: Id,
    source: &Source,
    candidates: &mut Vec<Candidate>,
) -> Result<(), String> {
    let mut pending = vec![(Vec::new(), root)];
    let (mut dicts, mut found) = (1, 0);
    while let Some((keys, id)) = pending.pop() {
        let Object::Dict(pairs) = pickle.get(id) else { continue };
        let mut tensors = HashMap::new();
        for &(key, value) in pairs {
            let Object::Text(key) = *pickle.get(key) else { continue };
            let dict = matches!(pickle.get(value), Object::Dict(_)) && keys.len() < DEPTH;
            let stored = if dict { None } else { stored(pickle, value) };
            if (dict || stored.is_some()) && key.len() > NAME {
                return Err(format!(
                    "holds a name of {} bytes; at most {NAME} are read",
                    key.len()
                ));
            }
            if let Some(stored) = stored {
                let stored = stored.map_err(|problem| format!("`{key}`: {problem}"))?;
                tensors.insert(key.to_owned(), stored);
                found += 1;
                if found > TENSORS {
                    return Err(format!(
                        "holds more than {TENSORS} tensors, which no checkpoint does"
                    ));
                }
            } else if dict {
                dicts += 1;
                if dicts > DICTS {
                    return Err(format!("holds more than {DICTS} dicts, which no checkpoint does"));
                }
                let mut keys = keys.clone();
                keys.push(key.to_owned());
                pending.push((keys, value));
            }
        }
        if !tensors.is_empty() {
            let weight =
                |(name, stored): (String, Stored)| (name.clone(), source.weight(name, stored));
            let weights = tensors.into_iter().map(weight).collect();
            candidates.push(Candidate { keys, weights });
        }
    }
    // The order of the file, and outer dicts before inner ones.
    candidates.sort_by_key(|candidate| candidate.keys.len());
    Ok(())
}

/// What the root is, for whoever expected tensors.
fn describe(pickle: &Pickle<'_>) -> String {
    if let Some((module, name, _)) = pickle.call(pickle.root) {
        return format!(
            "an object of `{module}.{name}`, which is code; load it in PyTorch and torch.save its state_dict()"
        );
    }
    let Object::Dict(pairs) = pickle.get(pickle.root) else {
        return "something else than a dict; torch.save a network's state_dict()".into();
    };
    let keys: Vec<&str> = pairs
        .iter()
        .filter_map(|&(key, _)| match pickle.get(key) {
            Object::Text(key) => Some(*key),
            _ => None,
        })
        .collect();
    if keys.contains(&"param_groups") && keys.contains(&"state") {
        return "the state of an optimizer; give the file of the model or of its average (guided-diffusion: \
                model….pt or ema_….pt, not opt….pt)"
            .into();
    }
    let shown: Vec<String> = keys.iter().take(12).map(|key| format!("`{key:.TOLD$}`")).collect();
    let more = if keys.len() > shown.len() { ", …" } else { "" };
    match shown.is_empty() {
        true => "no names".into(),
        false => format!("{}{more}", shown.join(", ")),
    }
}

/// A tensor as the pickle describes it.
struct Stored {
    /// `FloatStorage`.
    storage: String,
    dtype: Option<DType>,
    /// The member of the archive, and how many elements that has.
    key: String,
    elements: usize,
    offset: usize,
    shape: Vec<usize>,
    strides: Vec<usize>,
}

/// The tensor that an object would become; nothing for another object.
fn stored(pickle: &Pickle<'_>, id: Id) -> Option<Result<Stored, String>> {
    let (mut module, mut name, mut arguments) = pickle.call(id)?;
    // Parameters and subclasses wrap a tensor once or twice.
    for _ in 0..4 {
        match (module, name, arguments) {
            (
                "torch._utils",
                "_rebuild_parameter" | "_rebuild_parameter_with_state",
                [inner, ..],
            ) => {
                (module, name, arguments) = pickle.call(*inner)?;
            }
            ("torch._tensor", "_rebuild_from_type_v2", [function, _, inner, ..]) => {
                let (Object::Global(of, called), Object::Tuple(inner)) =
                    (pickle.get(*function), pickle.get(*inner))
                else {
                    return None;
                };
                (module, name, arguments) = (of, called, inner);
            }
            (
                "torch._utils",
                "_rebuild_tensor_v2" | "_rebuild_tensor",
                [storage, offset, shape, strides, ..],
            ) => {
                let stored = rebuilt(pickle, [*storage, *offset, *shape, *strides]);
                return Some(
                    stored.ok_or_else(|| "is a tensor described in an unknown way".into()),
                );
            }
            _ => return None,
        }
    }
    None
}

fn rebuilt(pickle: &Pickle<'_>, [storage, offset, shape, strides]: [Id; 4]) -> Option<Stored> {
    let size = |id: Id| match pickle.get(id) {
        Object::Int(number) => usize::try_from(*number).ok(),
        _ => None,
    };
    let sizes = |id: Id| match pickle.get(id) {
        Object::Tuple(items) | Object::List(items) if items.len() <= SIDES => {
            items.iter().map(|&item| size(item)).collect()
        }
        _ => None,
    };
    let Object::Persistent(storage) = pickle.get(storage) else { return None };
    let Object::Tuple(parts) = pickle.get(*storage) else { return None };
    let [_, kind, key, _, elements] = parts[..] else { return None };
    let (Object::Global(_, kind), Object::Text(key)) = (pickle.get(kind), pickle.get(key)) else {
        return None;
    };
    let dtype = match *kind {
        "FloatStorage" => Some(DType::F32),
        "DoubleStorage" => Some(DType::F64),
        "HalfStorage" => Some(DType::F16),
        "BFloat16Storage" => Some(DType::BF16),
        "ByteStorage" => Some(DType::U8),
        "LongStorage" => Some(DType::I64),
        _ => None,
    };
    let (shape, strides): (Vec<usize>, Vec<usize>) = (sizes(shape)?, sizes(strides)?);
    let short = kind.len() <= NAME && key.len() <= NAME;
    (shape.len() == strides.len() && short).then_some(Stored {
        storage: (*kind).to_owned(),
        dtype,
        key: (*key).to_owned(),
        elements: size(elements)?,
        offset: size(offset)?,
        shape,
        strides,
    })
}

impl Stored {
    /// Elements of the tensor, and of the storage from its first to past its last; nothing where they do not lie in
    /// the storage, or repeat its elements.
    fn extent(&self) -> Option<(usize, usize)> {
        let count = self.shape.iter().try_fold(1usize, |count, &side| count.checked_mul(side))?;
        if count == 0 {
            return Some((0, 0));
        }
        let sides = self.shape.iter().zip(&self.strides);
        let mut last = sides.map(|(&side, &stride)| (side - 1).checked_mul(stride));
        let last = last.try_fold(0usize, |last, step| last.checked_add(step?))?;
        let end = self.offset.checked_add(last)?.checked_add(1)?;
        (end <= self.elements && count <= self.elements).then_some((count, last + 1))
    }

    /// The elements in the order of the tensor, out of its part of the storage.
    fn gathered(&self, bytes: Vec<u8>, count: usize, width: usize) -> io::Result<Vec<u8>> {
        let mut contiguous = 1;
        let mut in_order = true;
        for (&side, &stride) in self.shape.iter().zip(&self.strides).rev() {
            in_order &= side == 1 || stride == contiguous;
            contiguous *= side;
        }
        if in_order {
            return Ok(bytes);
        }
        let mut gathered = read::zeroed(count * width)?;
        let mut place = vec![0; self.shape.len()];
        for element in gathered.chunks_exact_mut(width) {
            let from: usize = place.iter().zip(&self.strides).map(|(at, stride)| at * stride).sum();
            element.copy_from_slice(&bytes[from * width..][..width]);
            for (at, &side) in place.iter_mut().zip(&self.shape).rev() {
                *at += 1;
                if *at < side {
                    break;
                }
                *at = 0;
            }
        }
        Ok(gathered)
    }
}

/// An open file of `torch.save`.
#[derive(Clone)]
struct Source {
    path: PathBuf,
    /// Bytes of the file.
    length: u64,
    /// The archive's folder of tensors.
    folder: String,
    archive: Rc<RefCell<ZipArchive<BufReader<File>>>>,
}

impl Source {
    fn weight(&self, name: String, stored: Stored) -> Weight {
        let source = self.clone();
        // Of a type that no weight has, which is told when the weight is read.
        let dtype = stored.dtype.unwrap_or(DType::U8);
        Weight::Later {
            shape: stored.shape.clone(),
            dtype,
            read: Box::new(move || {
                let refuse = |problem: String| Error::Format {
                    path: source.path.clone(),
                    problem: format!("`{name}`: {problem}"),
                };
                let dtype =
                    stored.dtype.ok_or_else(|| refuse(format!("is a {}", stored.storage)))?;
                let bytes = source.read(&stored, dtype.size_in_bytes()).map_err(refuse)?;
                if !all_finite(&bytes, dtype) {
                    return Err(refuse(NOT_FINITE.into()));
                }
                Ok(Tensor::from_raw_buffer(&bytes, dtype, &stored.shape, &Device::Cpu)?)
            }),
        }
    }

    fn read(&self, stored: &Stored, width: usize) -> Result<Vec<u8>, String> {
        let outside = "does not lie in its storage, or repeats it";
        let (count, span) = stored.extent().ok_or(outside)?;
        let skipped = stored.offset.checked_mul(width).ok_or(outside)? as u64;
        let bytes = span.checked_mul(width).ok_or(outside)?;
        // Members are not compressed, so none is longer than the file.
        if bytes as u64 > self.length {
            return Err(format!("takes {bytes} bytes, the file has {}", self.length));
        }
        let mut archive = self.archive.borrow_mut();
        let member = format!("{}{}", self.folder, stored.key);
        let mut member =
            archive.by_name(&member).map_err(|error| format!("`{member}`: {error}"))?;
        let mut read = || -> io::Result<Vec<u8>> {
            io::copy(&mut member.by_ref().take(skipped), &mut io::sink())?;
            let mut data = read::zeroed(bytes)?;
            member.read_exact(&mut data)?;
            if stored.offset == 0 && span == stored.elements {
                // At its end the checksum is compared.
                io::copy(&mut member, &mut io::sink())?;
            }
            stored.gathered(data, count, width)
        };
        read().map_err(|error| error.to_string())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::io::Write;

    use super::*;

    /// A file of `torch.save` with that pickle and no tensors.
    fn file(pickle: &[u8]) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("w.pt");
        let mut archive = zip::ZipWriter::new(File::create(&path).unwrap());
        let stored = zip::write::SimpleFileOptions::default()
            .compression_method(zip::CompressionMethod::Stored);
        archive.start_file("w/data.pkl", stored).unwrap();
        archive.write_all(pickle).unwrap();
        archive.finish().unwrap();
        (folder, path)
    }

    /// A dict in which one name of so many bytes stands for so many values.
    fn named(length: usize, value: &[u8], times: usize) -> Vec<u8> {
        let mut pickle = b"\x80\x02}q\x02}(X".to_vec();
        pickle.extend((length as u32).to_le_bytes());
        pickle.extend(vec![b'n'; length]);
        pickle.extend(b"q\x01N");
        (0..times).for_each(|_| pickle.extend([b"h\x01", value].concat()));
        pickle.extend(b"u.");
        pickle
    }

    /// What is named often and described once takes no memory for each name.
    #[test]
    fn names_that_repeat_are_not_copied_without_bounds() {
        // Nothing of these is a tensor.
        let (_folder, path) = file(&named(8 << 20, b"N", 4_000));
        assert!(open(&path).unwrap().candidates.is_empty());
        let dict = b"h\x02";
        let refused = |length, times| {
            let (_folder, path) = file(&named(length, dict, times));
            open(&path).err().map(|error| error.to_string()).unwrap_or_default()
        };
        assert!(refused(600, 1).contains("a name of 600 bytes; at most 512"));
        assert!(refused(500, 20_000).contains("more than 10000 dicts"));
        assert_eq!(refused(500, 100), "");
    }
}
