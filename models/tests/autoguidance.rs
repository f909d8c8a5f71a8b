//! A model folder with a guide in it.
#![allow(clippy::unwrap_used)]

#[path = "../../tests/common/folder.rs"]
mod folder;

use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use folder::copy;
use serde_json::{Value, json};
use understudy_models::checkpoint::ModelFolder;
use understudy_models::{Denoiser, noise};

fn bundled(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("zoo").join(name)
}

fn edit(file: &Path, change: impl FnOnce(&mut Value)) {
    let mut json = serde_json::from_slice(&fs::read(file).unwrap()).unwrap();
    change(&mut json);
    fs::write(file, json.to_string()).unwrap();
}

/// The bundled teacher, guided by its DKDM student.
fn guided(home: &Path, scale: f64) -> PathBuf {
    let path = home.join("guided");
    copy(&bundled("fashion-mnist-teacher"), &path);
    copy(&bundled("fashion-mnist-student"), &path.join("guide"));
    edit(&path.join("understudy.json"), |card| card["autoguidance"] = json!({ "scale": scale }));
    path
}

fn load(path: &Path) -> Box<dyn Denoiser> {
    ModelFolder::open(path).unwrap().load(DType::F32, &Device::Cpu).unwrap().network
}

#[test]
fn an_answer_goes_on_from_the_guides_beyond_the_networks_own() {
    let home = tempfile::tempdir().unwrap();
    let path = guided(home.path(), 1.5);
    let (both, own, guide) =
        (load(&path), load(&bundled("fashion-mnist-teacher")), load(&path.join("guide")));
    let rows = 3;
    let mut values = vec![0.0; rows * 32 * 32];
    noise::normal(3, 0, &mut values);
    let x = Tensor::from_vec(values, (rows, 1, 32, 32), &Device::Cpu).unwrap();
    let times = Tensor::new(&[900_f32, 500.0, 20.0], &Device::Cpu).unwrap();
    let classes = Tensor::new(&[1_u32, 7, 9], &Device::Cpu).unwrap();
    let values = |network: &dyn Denoiser, row: usize, count: usize| -> Vec<f32> {
        let part = |tensor: &Tensor| tensor.narrow(0, row, count).unwrap();
        let answer = network.forward(&part(&x), &part(&times), Some(&part(&classes))).unwrap();
        answer.flatten_all().unwrap().to_vec1().unwrap()
    };
    let led = values(both.as_ref(), 0, rows);
    let (told, worse) = (values(own.as_ref(), 0, rows), values(guide.as_ref(), 0, rows));
    for (led, (told, worse)) in led.iter().zip(told.iter().zip(&worse)) {
        let expected = f64::from(*worse) + 1.5 * (f64::from(*told) - f64::from(*worse));
        assert!((f64::from(*led) - expected).abs() < 1e-5, "{led} {expected}");
    }
    // A row's answer is its own, to the bit.
    let alone: Vec<f32> = (0..rows).flat_map(|row| values(both.as_ref(), row, 1)).collect();
    assert!(led.iter().zip(&alone).all(|(one, other)| one.to_bits() == other.to_bits()));
    assert_eq!(both.parameters(), own.parameters() + guide.parameters());
    let bytes = |network: &dyn Denoiser| network.footprint().unwrap().weight_bytes;
    assert_eq!(bytes(both.as_ref()), bytes(own.as_ref()) + bytes(guide.as_ref()));
}

#[test]
fn a_guide_that_does_not_fit_is_refused_by_its_field() {
    let home = tempfile::tempdir().unwrap();
    let path = guided(home.path(), 1.5);
    let refused = || ModelFolder::open(&path).unwrap_err().to_string();
    let guide = path.join("guide");

    for scale in [0.5, -1.0] {
        edit(&path.join("understudy.json"), |card| card["autoguidance"]["scale"] = json!(scale));
        assert!(refused().contains("`autoguidance.scale` is"), "{}", refused());
    }
    edit(&path.join("understudy.json"), |card| card["autoguidance"]["scale"] = json!(2));

    edit(&guide.join("scheduler/scheduler_config.json"), |schedule| {
        schedule["prediction_type"] = json!("epsilon");
    });
    let said = refused();
    assert!(
        said.contains("guide: prediction_type` is epsilon") && said.contains("v_prediction"),
        "{said}"
    );

    copy(&bundled("fashion-mnist-student"), &guide);
    edit(&guide.join("scheduler/scheduler_config.json"), |schedule| {
        schedule["beta_schedule"] = json!("linear");
    });
    assert!(refused().contains("guide: noise schedule` is"), "{}", refused());

    copy(&bundled("fashion-mnist-student"), &guide);
    edit(&guide.join("understudy.json"), |card| card["autoguidance"] = json!({ "scale": 2 }));
    assert!(refused().contains("guide: autoguidance` is there"), "{}", refused());

    copy(&bundled("fashion-mnist-student"), &guide);
    edit(&guide.join("unet/config.json"), |network| network["num_class_embeds"] = json!(9));
    edit(&guide.join("understudy.json"), |card| {
        drop(card.as_object_mut().unwrap().remove("class_names"))
    });
    let said = refused();
    assert!(said.contains("guide: network` is") && said.contains("Classes(10)"), "{said}");

    fs::remove_dir_all(&guide).unwrap();
    assert!(refused().contains("guide"), "{}", refused());
}
