//! Files as `torch.save` writes them, from tensors and a shape of dicts around them.

use std::{collections::BTreeMap, io::Write, path::Path};

use candle_core::{DType, Tensor};
use zip::{CompressionMethod, ZipWriter, write::SimpleFileOptions};

/// What is pickled.
pub(crate) enum Object {
    Dict(Vec<(&'static str, Object)>),
    /// A state dict, with this before every name.
    Tensors(&'static str, BTreeMap<String, Tensor>),
    Int(u8),
}

/// Writes the file.
pub(crate) fn save(path: &Path, object: &Object) {
    let mut storages = Vec::new();
    let mut pickle = vec![0x80, 2];
    put(object, &mut pickle, &mut storages);
    pickle.push(b'.');
    save_pickle(path, &pickle, &storages);
}

/// Writes a file around the bytes of a pickle.
pub(crate) fn save_pickle(path: &Path, pickle: &[u8], storages: &[Vec<u8>]) {
    let mut archive = ZipWriter::new(std::fs::File::create(path).unwrap());
    let stored = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
    let mut member = |name: String, bytes: &[u8]| {
        archive.start_file(name, stored).unwrap();
        archive.write_all(bytes).unwrap();
    };
    member("archive/data.pkl".into(), pickle);
    member("archive/byteorder".into(), b"little");
    for (i, bytes) in storages.iter().enumerate() {
        member(format!("archive/data/{i}"), bytes);
    }
    archive.finish().unwrap();
}

fn put(object: &Object, pickle: &mut Vec<u8>, storages: &mut Vec<Vec<u8>>) {
    match object {
        Object::Int(number) => pickle.extend([b'K', *number]),
        Object::Dict(entries) => {
            pickle.extend(b"}(");
            for (key, value) in entries {
                text(key, pickle);
                put(value, pickle, storages);
            }
            pickle.push(b'u');
        }
        Object::Tensors(prefix, tensors) => {
            pickle.extend(b"ccollections\nOrderedDict\n)R(");
            for (name, value) in tensors {
                text(&format!("{prefix}{name}"), pickle);
                tensor(value, pickle, storages);
            }
            pickle.push(b'u');
        }
    }
}

fn tensor(tensor: &Tensor, pickle: &mut Vec<u8>, storages: &mut Vec<Vec<u8>>) {
    let values: Vec<f32> =
        tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap();
    pickle.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
    text("storage", pickle);
    pickle.extend(b"ctorch\nFloatStorage\n");
    text(&storages.len().to_string(), pickle);
    text("cpu", pickle);
    int(values.len(), pickle);
    pickle.extend(b"tQ");
    int(0, pickle);
    for sizes in [tensor.dims(), tensor.stride()] {
        pickle.push(b'(');
        sizes.iter().for_each(|&size| int(size, pickle));
        pickle.push(b't');
    }
    pickle.extend([0x89]);
    pickle.extend(b"ccollections\nOrderedDict\n)RtR");
    storages.push(values.iter().flat_map(|value| value.to_le_bytes()).collect());
}

fn text(text: &str, pickle: &mut Vec<u8>) {
    pickle.push(b'X');
    pickle.extend((text.len() as u32).to_le_bytes());
    pickle.extend(text.as_bytes());
}

fn int(number: usize, pickle: &mut Vec<u8>) {
    pickle.push(b'J');
    pickle.extend((number as i32).to_le_bytes());
}
