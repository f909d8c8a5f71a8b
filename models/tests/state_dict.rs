//! State dicts inside of what training programs put around them, and files that are none.
#![allow(clippy::unwrap_used)]

#[path = "common/torch.rs"]
mod torch;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use candle_core::{Device, Tensor};
use understudy_models::checkpoint::StateDict;

use torch::Object::{Dict, Int, Tensors};

/// Two weights whose values begin at `first`.
fn network(first: f32) -> BTreeMap<String, Tensor> {
    let tensor = |from: f32, shape: &[usize]| {
        let count = shape.iter().product::<usize>();
        let values: Vec<f32> = (0..count).map(|i| from + i as f32).collect();
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    };
    BTreeMap::from([
        ("in.weight".into(), tensor(first, &[2, 3])),
        ("in.bias".into(), tensor(first + 10.0, &[2])),
    ])
}

fn names() -> BTreeSet<String> {
    network(0.0).into_keys().collect()
}

/// The first value of the network in a file, all of which has the right names.
fn first(object: &torch::Object) -> Result<f32, String> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("w.pt");
    torch::save(&path, object);
    let mut file = StateDict::open(&path, &names()).map_err(|error| error.to_string())?;
    assert_eq!(file.shapes().into_keys().collect::<BTreeSet<_>>(), names());
    let weight: Vec<Vec<f32>> = file.take("in.weight").unwrap().to_vec2().unwrap();
    assert_eq!(weight[1][2], weight[0][0] + 5.0);
    Ok(weight[0][0])
}

#[test]
fn known_wrappers_are_taken_off() {
    let plain = |prefix| Tensors(prefix, network(1.0));
    for object in [
        plain(""),
        plain("module."),
        plain("_orig_mod."),
        plain("_orig_mod.module."),
        plain("model.diffusion_model."),
        Dict(vec![
            ("epoch", Int(3)),
            ("state_dict", plain("module.")),
            ("optimizer", Dict(vec![])),
        ]),
        Dict(vec![("model", plain("")), ("optimizer", plain("exp_avg."))]),
        Dict(vec![("state", Dict(vec![("ema_model", plain("")), ("step", Int(1))]))]),
        // Something else of the same program beside the network.
        Dict(vec![("first_stage", Tensors("vae.", network(5.0))), ("model", plain("module."))]),
    ] {
        assert_eq!(first(&object).unwrap(), 1.0);
    }
}

#[test]
fn a_running_average_is_preferred() {
    let both = |average| {
        Dict(vec![("model", Tensors("", network(1.0))), (average, Tensors("", network(2.0)))])
    };
    assert_eq!(first(&both("ema")).unwrap(), 2.0);
    assert_eq!(first(&both("ema_state_dict")).unwrap(), 2.0);
}

#[test]
fn unknown_wrappers_and_other_files_are_named() {
    let says = |object: torch::Object, parts: &[&str]| {
        let problem = first(&object).unwrap_err();
        assert!(parts.iter().all(|part| problem.contains(part)), "{problem}");
        assert!(problem.contains("w.pt"), "{problem}");
    };
    says(Dict(vec![("student", Tensors("", network(1.0)))]), &["[\"student\"]", "known wrappers"]);
    says(Tensors("student.", network(1.0)), &["`student.`", "known wrappers"]);
    let optimizer = vec![("state", Dict(vec![])), ("param_groups", Dict(vec![]))];
    says(Dict(optimizer), &["optimizer", "ema_"]);
    says(Dict(vec![("epoch", Int(1)), ("lr", Int(2))]), &["`epoch`, `lr`"]);
    says(Int(1), &["no tensors by name"]);
}

/// The error of a file around a pickle.
fn refusal(pickle: &[u8]) -> String {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("w.pt");
    torch::save_pickle(&path, pickle, &[vec![0; 24]]);
    StateDict::open(&path, &names())
        .and_then(|mut file| file.take("in.weight"))
        .unwrap_err()
        .to_string()
}

/// A dict of one tensor: its storage's key and elements, then offset, shape and strides.
fn described(key: &str, elements: i32, offset: i32, shape: &[i32], strides: &[i32]) -> Vec<u8> {
    let text =
        |text: &str| [&[b'X'][..], &(text.len() as u32).to_le_bytes(), text.as_bytes()].concat();
    let int = |number: &i32| [&[b'J'][..], &number.to_le_bytes()].concat();
    let ints = |numbers: &[i32]| numbers.iter().flat_map(int).collect::<Vec<u8>>();
    [
        b"\x80\x02}",
        &text("in.weight")[..],
        b"ctorch._utils\n_rebuild_tensor_v2\n((",
        &text("storage"),
        b"ctorch\nFloatStorage\n",
        &text(key),
        &text("cpu"),
        &int(&elements),
        b"tQ",
        &int(&offset),
        b"(",
        &ints(shape),
        b"t(",
        &ints(strides),
        b"t\x89}tRs.",
    ]
    .concat()
}

#[test]
fn hostile_descriptions_are_refused_by_file_and_tensor() {
    for (pickle, part) in [
        (described("0", 6, 1, &[2, 3], &[3, 1]), "storage"),
        (described("0", 6, 0, &[2, 3], &[i32::MAX, 1]), "storage"),
        (described("0", 6, 0, &[i32::MAX, i32::MAX], &[0, 0]), "storage"),
        (described("0", i32::MAX, 0, &[i32::MAX], &[1]), "bytes"),
        (described("0", 12, 0, &[2, 6], &[6, 1]), "w.pt"),
        (described("../0", 6, 0, &[2, 3], &[3, 1]), "../0"),
        (described("0", -6, 0, &[2, 3], &[3, 1]), "unknown way"),
        (described("0", 6, 0, &[2, 3], &[3]), "unknown way"),
    ] {
        let problem = refusal(&pickle);
        assert!(problem.contains(part) && problem.contains("w.pt"), "{problem}");
        assert!(problem.contains("in.weight") || problem.contains("w.pt"), "{problem}");
    }
    for pickle in [
        &b"cposix\nsystem\n(X\x02\x00\x00\x00lstR."[..],
        b")\x85\x85.",
        b"ctorch._utils\n_rebuild_parameter\n)R.",
    ] {
        let problem = refusal(pickle);
        assert!(problem.contains("w.pt"), "{problem}");
    }
    assert!(refusal(b"X\xff\xff\xff\xff").contains("too early"));
}

#[test]
fn transposed_and_partial_tensors_are_read_as_they_are() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("w.pt");
    let storage: Vec<u8> = (0..8u8).flat_map(|i| f32::from(i).to_le_bytes()).collect();
    let read = |pickle: &[u8]| -> Vec<Vec<f32>> {
        torch::save_pickle(&path, pickle, std::slice::from_ref(&storage));
        let mut file = StateDict::open(&path, &names()).unwrap();
        file.take("in.weight").unwrap().to_vec2().unwrap()
    };
    let transposed = read(&described("0", 8, 1, &[2, 3], &[1, 2]));
    assert_eq!(transposed, [[1.0, 3.0, 5.0], [2.0, 4.0, 6.0]]);
    assert_eq!(read(&described("0", 8, 2, &[2, 3], &[3, 1]))[1], [5.0, 6.0, 7.0]);
}

#[test]
fn real_files_of_pytorch_are_read() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/adm/one_level.pt");
    let theirs: BTreeMap<String, Tensor> =
        candle_core::pickle::read_all(&golden).unwrap().into_iter().collect();
    let mut file = StateDict::open(&golden, &theirs.keys().cloned().collect()).unwrap();
    assert_eq!(file.shapes().len(), theirs.len());
    for (name, tensor) in theirs {
        let found = file.take(&name).unwrap().flatten_all().unwrap();
        let same = |tensor: &Tensor| {
            tensor.to_dtype(candle_core::DType::F64).unwrap().to_vec1::<f64>().unwrap()
        };
        assert_eq!(same(&found), same(&tensor.flatten_all().unwrap()), "{name}");
    }
}
