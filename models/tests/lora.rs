//! Models with LoRAs against diffusers' `fuse_lora` (`golden/make_loras.py`).

#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use understudy_models::checkpoint::card::{Card, CardLora};
use understudy_models::checkpoint::{Draft, Lora, ModelFolder};

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

fn load(path: &Path) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(path, &Device::Cpu).unwrap()
}

/// The largest difference of two tensors, as part of the largest value.
fn distance(a: &Tensor, b: &Tensor) -> f32 {
    let largest = |it: &Tensor| it.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
    largest(&(a - b).unwrap()) / largest(b)
}

fn pipeline() -> PathBuf {
    golden().join("pipeline/stable_diffusion")
}

#[test]
fn weights_become_what_diffusers_makes_of_them() {
    for name in ["diffusers", "kohya"] {
        let lora = Lora::open(&golden().join(format!("lora/{name}.safetensors")), 0.7).unwrap();
        let merged = load(&golden().join(format!("lora/{name}_merged.safetensors")));
        let plain = ModelFolder::open(&pipeline()).unwrap().tensors().unwrap();
        let model = ModelFolder::open(&pipeline()).unwrap().with_loras([lora]).unwrap();
        let mut changed = 0;
        for (weight, ours) in model.tensors().unwrap() {
            let Some(theirs) = merged.get(&format!("unet.{weight}")) else {
                assert_eq!(distance(&ours, &plain[&weight]), 0.0, "{weight}");
                continue;
            };
            assert!(distance(&ours, theirs) < 1e-6, "{name}: {weight}");
            changed += 1;
        }
        // The text encoder's are in no file of the folder, so whoever writes it with another network writes them.
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("student");
        let network = model.network.clone();
        let weights = model.tensors().unwrap();
        let schedule = model.schedule.clone();
        let draft = Draft::new(&out).unwrap();
        ModelFolder::write_around(
            draft,
            &network,
            &weights,
            &schedule,
            &Card::default(),
            Some(&model),
        )
        .unwrap();
        for (weight, ours) in load(&out.join("text_encoder/model.safetensors")) {
            let Some(theirs) = merged.get(&format!("text_encoder.{weight}")) else { continue };
            assert!(distance(&ours, theirs) < 1e-6, "{name}: {weight}");
            changed += 1;
        }
        assert_eq!(changed, merged.len(), "{name}");
        ModelFolder::open(&out).unwrap().load(DType::F32, &Device::Cpu).unwrap();
    }
}

#[test]
fn a_card_names_what_is_always_added_and_nothing_outside_of_its_folder() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("model");
    let model = ModelFolder::open(&pipeline()).unwrap();
    let weights = model.tensors().unwrap();
    let lora = CardLora { file: "style.safetensors".into(), scale: 0.7 };
    let card = Card { loras: vec![lora], ..Card::default() };
    let draft = Draft::new(&out).unwrap();
    let (network, schedule) = (model.network.clone(), model.schedule.clone());
    ModelFolder::write_around(draft, &network, &weights, &schedule, &card, Some(&model)).unwrap();
    let problem = ModelFolder::open(&out).unwrap_err().to_string();
    assert!(problem.contains("style.safetensors"), "{problem}");

    std::fs::copy(golden().join("lora/kohya.safetensors"), out.join("style.safetensors")).unwrap();
    let merged = load(&golden().join("lora/kohya_merged.safetensors"));
    let tensors = ModelFolder::open(&out).unwrap().tensors().unwrap();
    let name = "conv_in.weight";
    assert_eq!(distance(&tensors[name], &weights[name]), 0.0);
    let changed = tensors
        .iter()
        .filter_map(|(name, ours)| Some(distance(ours, merged.get(&format!("unet.{name}"))?)));
    let distances: Vec<f32> = changed.collect();
    assert!(distances.len() > 20 && distances.iter().all(|it| *it < 1e-6), "{distances:?}");

    let card = std::fs::read_to_string(out.join("understudy.json")).unwrap();
    std::fs::write(out.join("understudy.json"), card.replace("style", "../style")).unwrap();
    let problem = ModelFolder::open(&out).unwrap_err().to_string();
    assert!(problem.contains("../style.safetensors") && problem.contains("beside"), "{problem}");
}
