//! Imported guided-diffusion checkpoints against guided-diffusion's own answers.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use serde_json::{Value, json};
use understudy_models::Denoiser;
use understudy_models::NetworkConfig;
use understudy_models::checkpoint::adm;

const CASES: [&str; 5] = ["improved", "legacy_order", "middle_attention", "new_order", "one_level"];

fn golden(name: &str, kind: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/adm");
    folder.join(format!("{name}.{kind}"))
}

fn read_json(path: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

/// Loads the network from a folder, as anyone would.
fn load(folder: &Path) -> Box<dyn Denoiser> {
    let config = read_json(&folder.join("unet/config.json"));
    let config = NetworkConfig::from_json(&config, "unet/config.json").unwrap();
    let weights = folder.join("unet/diffusion_pytorch_model.safetensors");
    let weights = candle_core::safetensors::load(weights, &Device::Cpu).unwrap();
    config.load(weights, DType::F32, &Device::Cpu).unwrap()
}

fn relative_error(found: &Tensor, expected: &Tensor) -> f32 {
    let largest = |t: &Tensor| {
        t.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap()
    };
    largest(&(found - expected).unwrap()) / largest(expected)
}

#[test]
fn answers_as_guided_diffusion_does() {
    for name in CASES {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("models").join(name);
        let config = adm::import(&golden(name, "pt"), &golden(name, "json"), &out).unwrap();
        let model = load(&out);
        assert_eq!(model.geometry(), &config.geometry());
        let inputs = golden(name, "safetensors");
        let tensors = candle_core::safetensors::load(inputs, &Device::Cpu).unwrap();
        let labels = tensors.get("labels").map(|labels| labels.to_dtype(DType::U32).unwrap());
        let output = model.forward(&tensors["x"], &tensors["timesteps"], labels.as_ref()).unwrap();
        let error = relative_error(&output, &tensors["output"]);
        println!("{name}: {error:.2e}");
        assert!(error <= 1e-4, "{name}: relative error {error:e}");
        // Nothing but the folder is left.
        assert_eq!(std::fs::read_dir(out.parent().unwrap()).unwrap().count(), 1);
    }
}

#[test]
fn the_scheduler_is_that_of_the_flags() {
    let scheduler = |name: &str| {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join(name);
        adm::import(&golden(name, "pt"), &golden(name, "json"), &out).unwrap();
        assert_eq!(read_json(&out.join("model_index.json"))["unet"][1], "UNet2DModel");
        read_json(&out.join("scheduler/scheduler_config.json"))
    };
    let new_order = scheduler("new_order");
    assert_eq!(new_order["_class_name"], "DDPMScheduler");
    assert_eq!(new_order["beta_schedule"], "squaredcos_cap_v2");
    assert_eq!(new_order["variance_type"], "learned_range");
    assert_eq!(new_order["prediction_type"], "epsilon");
    assert_eq!(new_order["num_train_timesteps"], 1000);

    let plain = scheduler("middle_attention");
    assert_eq!(plain["beta_schedule"], "linear");
    assert_eq!(plain["beta_start"], 1e-4);
    assert_eq!(plain["beta_end"], 0.02);
    assert_eq!(plain["variance_type"], "fixed_small");
    assert_eq!(plain["prediction_type"], "sample");
    assert_eq!(scheduler("one_level")["variance_type"], "fixed_large");

    // 4000 steps whose network is told the time in thousandths: every fourth step, exactly.
    let strided = scheduler("improved");
    assert_eq!(strided["num_train_timesteps"], 1000);
    let betas = strided["trained_betas"].as_array().unwrap();
    assert_eq!(betas.len(), 1000);
    let alpha_bar = |t: f64| ((t + 0.008) / 1.008 * std::f64::consts::FRAC_PI_2).cos().powi(2);
    let mut product = 1.0;
    for (i, beta) in betas.iter().enumerate() {
        product *= 1.0 - beta.as_f64().unwrap();
        let expected = alpha_bar((4 * i + 1) as f64 / 4000.0) / alpha_bar(0.0);
        assert!((product - expected).abs() < 1e-9, "step {i}: {product} against {expected}");
    }
}

/// The error of importing `weights` with the flags of `name` changed by `changes`.
fn refusal(name: &str, weights: &Path, changes: Value) -> String {
    let folder = tempfile::tempdir().unwrap();
    let mut flags = read_json(&golden(name, "json"));
    for (flag, value) in changes.as_object().unwrap() {
        if value.is_null() {
            flags.as_object_mut().unwrap().remove(flag);
        } else {
            flags[flag] = value.clone();
        }
    }
    let arch = folder.path().join("arch.json");
    std::fs::write(&arch, flags.to_string()).unwrap();
    let out = folder.path().join("out");
    let error = adm::import(weights, &arch, &out).unwrap_err().to_string();
    // Neither a folder nor the beginnings of one.
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "{error}");
    error
}

#[test]
fn what_cannot_be_expressed_is_refused_by_name() {
    let weights = golden("improved", "pt");
    for (changes, flag) in [
        // Heads of 8 channels at the first level, of 16 below.
        (json!({"attention_resolutions": "8,4"}), "num_heads"),
        (json!({"num_heads_upsample": 2}), "num_heads_upsample"),
        (json!({"num_heads": 3}), "num_heads"),
        (json!({"num_heads": 0}), "num_heads"),
        (json!({"num_heads": -1}), "num_heads"),
        (json!({"num_head_channels": 48}), "num_head_channels"),
        (json!({"channel_mult": "0.5,1"}), "channel_mult"),
        (json!({"channel_mult": "2,2"}), "channel_mult"),
        (json!({"channel_mult": ""}), "channel_mult"),
        (json!({"channel_mult": "1,x"}), "channel_mult"),
        (json!({"channel_mult": "1,-2"}), "channel_mult"),
        (json!({"channel_mult": [1, 0.001]}), "block_out_channels[1]"),
        (json!({"channel_mult": vec![1; 100]}), "block_out_channels"),
        (json!({"num_channels": 48}), "num_channels"),
        (json!({"num_channels": 1u64 << 50}), "num_channels"),
        (json!({"image_size": 9, "attention_resolutions": ""}), "sample_size"),
        (json!({"attention_resolutions": "0"}), "attention_resolutions"),
        (json!({"attention_resolutions": {}}), "attention_resolutions"),
        (json!({"conv_resample": false}), "conv_resample"),
        (json!({"dims": 3}), "dims"),
        (json!({"large_size": 256}), "large_size"),
        (json!({"classifier_depth": 2}), "classifier_depth"),
        (json!({"num_chanels": 32}), "num_chanels"),
        (json!({"noise_schedule": "sqrt"}), "noise_schedule"),
        (json!({"rescale_timesteps": null}), "rescale_timesteps"),
        (json!({"diffusion_steps": 1500}), "diffusion_steps"),
        (
            json!({"diffusion_steps": 20, "noise_schedule": "linear", "rescale_timesteps": false}),
            "diffusion_steps",
        ),
        (json!({"learn_sigma": "True"}), "learn_sigma"),
    ] {
        let message = refusal("improved", &weights, changes.clone());
        assert!(message.contains(&format!(": {flag}` is ")), "{changes}: {message}");
        assert!(message.contains("arch.json"), "{message}");
    }
}

#[test]
fn tensors_that_do_not_fit_the_flags_are_named() {
    let weights = golden("new_order", "pt");
    let says = |changes: Value, part: &str| {
        let message = refusal("new_order", &weights, changes);
        assert!(message.contains(part), "{message}");
    };
    says(json!({"class_cond": false}), "1 not of this network: `label_emb.weight` [7, 128]");
    says(json!({"num_classes": 8}), "`label_emb.weight` is [7, 128], not [8, 128]");
    says(json!({"learn_sigma": false}), "`out.2.bias` is [6], not [3]");
    says(json!({"use_scale_shift_norm": false}), "emb_layers.1.bias` is [64], not [32]");
    says(json!({"attention_resolutions": "8,4"}), "missing: `input_blocks.1.1.norm.bias` [32]");
    says(json!({"resblock_updown": false}), "missing: `input_blocks.2.0.op.bias` [32]");
    says(json!({"num_res_blocks": 2}), "missing");
}

#[test]
fn files_that_are_not_zipped_state_dicts_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, bytes: &[u8]| {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    };
    let says = |weights: &Path, part: &str| {
        let message = refusal("one_level", weights, json!({}));
        assert!(message.contains(part), "{message}");
    };
    says(&write("legacy.pt", b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."), "before version 1.6");
    says(&write("text.pt", b"weights"), "neither a file written by torch.save");
    says(&write("empty.pt", b""), "empty.pt");
    says(&folder.path().join("absent.pt"), "absent.pt");
    let whole = std::fs::read(golden("one_level", "pt")).unwrap();
    says(&write("cut.pt", &whole[..whole.len() / 2]), "cut.pt");
    says(&write("stub.pt", &whole[..40]), "stub.pt");
}

#[test]
fn an_existing_folder_is_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("model");
    std::fs::create_dir(&out).unwrap();
    std::fs::write(out.join("precious"), "x").unwrap();
    let (weights, arch) = (golden("one_level", "pt"), golden("one_level", "json"));
    let message = adm::import(&weights, &arch, &out).unwrap_err().to_string();
    assert!(message.contains("exists"), "{message}");
    assert_eq!(std::fs::read_dir(&out).unwrap().count(), 1);
    std::fs::remove_file(out.join("precious")).unwrap();
    adm::import(&weights, &arch, &out).unwrap();
    load(&out);
}
