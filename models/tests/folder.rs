//! Model folders as users have them: whole, damaged, and written back.

#![allow(clippy::unwrap_used)]

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
};

use candle_core::{DType, Device, Tensor};
use serde_json::{Value, json};
use tempfile::TempDir;
use understudy_models::{
    NetworkConfig,
    checkpoint::{Draft, ModelFolder, card::Card, is_model},
    schedule::ScheduleConfig,
    unet::UNet2DConfig,
};

fn unet() -> Value {
    json!({
        "_class_name": "UNet2DModel",
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": [8, 8],
        "layers_per_block": 1,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        "num_class_embeds": 3
    })
}

/// A small model, whole; `change` it before it is written.
fn folder(change: impl FnOnce(&mut HashMap<String, Tensor>, &mut Card)) -> (TempDir, PathBuf) {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("small");
    let config = UNet2DConfig::from_json(&unet(), "config.json").unwrap();
    let schedule = json!({"_class_name": "DDPMScheduler", "beta_schedule": "squaredcos_cap_v2"});
    let schedule = ScheduleConfig::from_json(&schedule, "scheduler_config.json").unwrap();
    let tensor = |(name, shape): (String, Vec<usize>)| {
        let values: Vec<f32> =
            (0..shape.iter().product()).map(|i: usize| (i % 7) as f32 * 0.01).collect();
        (name, Tensor::from_vec(values, shape, &Device::Cpu).unwrap())
    };
    let mut weights: HashMap<_, _> =
        NetworkConfig::from(config.clone()).weight_shapes().into_iter().map(tensor).collect();
    let names = ["Coat", "Bag", "Ankle boot"].map(String::from);
    let mut card = Card { class_names: names.into(), ..Card::default() };
    change(&mut weights, &mut card);
    ModelFolder::write(Draft::new(&path).unwrap(), &config.into(), &weights, &schedule, &card)
        .unwrap();
    (home, path)
}

/// What opening and loading says is wrong.
fn problem(path: &Path) -> String {
    let loaded = ModelFolder::open(path).and_then(|folder| folder.load(DType::F32, &Device::Cpu));
    loaded.err().expect("a problem").to_string()
}

fn edit(path: &Path, file: &str, change: impl FnOnce(&mut Value)) {
    let path = path.join(file);
    let mut value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    change(&mut value);
    fs::write(&path, value.to_string()).unwrap();
}

const WEIGHTS: &str = "unet/diffusion_pytorch_model.safetensors";

#[test]
fn what_is_written_is_read_back() {
    let (_home, path) = folder(|_, _| {});
    let opened = ModelFolder::open(&path).unwrap();
    assert_eq!(opened.card.class_names, ["Coat", "Bag", "Ankle boot"]);
    let loaded = opened.load(DType::F32, &Device::Cpu).unwrap();
    assert_eq!(loaded.network.geometry().height, 8);
    assert_eq!(loaded.schedule.train_timesteps(), 1000);
    let index: Value =
        serde_json::from_str(&fs::read_to_string(path.join("model_index.json")).unwrap()).unwrap();
    assert_eq!(index["unet"], json!(["diffusers", "UNet2DModel"]));
}

#[test]
fn bundled_folders_have_the_readme_that_is_written_for_them() {
    let zoo = Path::new(env!("CARGO_MANIFEST_DIR")).join("zoo");
    let mut seen = 0;
    for entry in fs::read_dir(&zoo).unwrap() {
        let folder = entry.unwrap().path();
        // Whoever trained a pipeline wrote its README: the written one tells of a network alone.
        if !is_model(&folder) || ModelFolder::open(&folder).unwrap().autoencoder.is_some() {
            continue;
        }
        seen += 1;
        let name = folder.file_name().unwrap().to_str().unwrap();
        let there = fs::read_to_string(folder.join("README.md")).unwrap_or_default();
        assert!(
            there == ModelFolder::open(&folder).unwrap().readme(),
            "{name}/README.md is out of date: cargo run -p understudy-models --example readme -- models/zoo/{name}"
        );
    }
    assert!(seen >= 2, "{seen} bundled models");
}

#[test]
fn early_folders_have_their_files_beside_the_index() {
    let (_home, path) = folder(|_, _| {});
    for file in ["unet/config.json", WEIGHTS, "scheduler/scheduler_config.json"] {
        fs::rename(path.join(file), path.join(Path::new(file).file_name().unwrap())).unwrap();
    }
    assert!(ModelFolder::open(&path).unwrap().load(DType::F32, &Device::Cpu).is_ok());
}

#[test]
fn shards_are_put_together_and_never_fetched_from_elsewhere() {
    let (_home, path) = folder(|_, _| {});
    let weights = candle_core::safetensors::load(path.join(WEIGHTS), &Device::Cpu).unwrap();
    fs::remove_file(path.join(WEIGHTS)).unwrap();
    let (mut map, mut shards) = (serde_json::Map::new(), [HashMap::new(), HashMap::new()]);
    for (i, (name, tensor)) in weights.into_iter().enumerate() {
        map.insert(name.clone(), json!(format!("part-{}.safetensors", i % 2)));
        shards[i % 2].insert(name, tensor);
    }
    for (i, shard) in shards.iter().enumerate() {
        candle_core::safetensors::save(shard, path.join(format!("unet/part-{i}.safetensors")))
            .unwrap();
    }
    let index = path.join(format!("{WEIGHTS}.index.json"));
    fs::write(&index, json!({ "weight_map": map }).to_string()).unwrap();
    assert!(ModelFolder::open(&path).unwrap().load(DType::F32, &Device::Cpu).is_ok());

    fs::write(&index, json!({"weight_map": {"conv_in.weight": "../../secret"}}).to_string())
        .unwrap();
    assert!(problem(&path).contains("weight_map"), "{}", problem(&path));
}

#[test]
fn missing_extra_and_misshapen_tensors_are_named() {
    let (_home, path) = folder(|weights, _| {
        weights.remove("conv_in.bias");
        let stray = Tensor::zeros(3, DType::F32, &Device::Cpu).unwrap();
        weights.insert("stray.weight".into(), stray.clone());
        weights.insert("conv_out.bias".into(), stray);
    });
    let problem = problem(&path);
    for named in ["conv_in.bias", "stray.weight", "conv_out.bias", WEIGHTS] {
        assert!(problem.contains(named), "{named} in: {problem}");
    }
    let (_home, path) = folder(|weights, _| {
        let bias = weights["conv_in.bias"].to_dtype(DType::I64).unwrap();
        weights.insert("conv_in.bias".into(), bias);
    });
    let problem = self::problem(&path);
    assert!(problem.contains("`conv_in.bias` is i64"), "{problem}");
}

#[test]
fn damaged_weights_are_an_error_that_names_the_file() {
    let (_home, path) = folder(|_, _| {});
    let whole = fs::read(path.join(WEIGHTS)).unwrap();
    let damaged: [(&str, Vec<u8>); 4] = [
        ("empty", Vec::new()),
        ("cut in the header", whole[..20].to_vec()),
        ("cut in the tensors", whole[..whole.len() - 1].to_vec()),
        ("a header of absurd length", [&u64::MAX.to_le_bytes()[..], &whole[8..]].concat()),
    ];
    for (what, bytes) in damaged {
        fs::write(path.join(WEIGHTS), bytes).unwrap();
        assert!(problem(&path).contains(WEIGHTS), "{what}: {}", problem(&path));
    }
    fs::remove_file(path.join(WEIGHTS)).unwrap();
    assert!(problem(&path).contains(WEIGHTS), "{}", problem(&path));
    assert!(problem(&path).contains("save_pretrained"), "{}", problem(&path));
}

#[test]
fn a_file_that_cannot_be_honoured_is_refused_by_name() {
    type Change = fn(&mut Value);
    let cases: [(&str, Change, &[&str]); 9] = [
        (
            "unet/config.json",
            |v| v["down_block_types"][1] = json!("SkipDownBlock2D"),
            &["down_block_types", "SkipDownBlock2D"],
        ),
        ("unet/config.json", |v| v["block_out_channels"] = json!([8, 9]), &["9"]),
        (
            "scheduler/scheduler_config.json",
            |v| v["beta_schedule"] = json!("moonlight"),
            &["beta_schedule", "moonlight"],
        ),
        (
            "scheduler/scheduler_config.json",
            |v| v["_class_name"] = json!("UniPCMultistepScheduler"),
            &["UniPCMultistepScheduler"],
        ),
        ("model_index.json", |v| v["unet"] = json!(["diffusers", "UNet3DModel"]), &["UNet3DModel"]),
        ("understudy.json", |v| v["rôle"] = json!("teacher"), &["understudy.json", "rôle"]),
        ("understudy.json", |v| v["class_names"] = json!(["Coat"]), &["class_names", "1", "3"]),
        (
            "understudy.json",
            |v| v["defaults"] = json!({"num_inference_steps": 1001}),
            &["num_inference_steps", "1001", "1 to 1000"],
        ),
        (
            "understudy.json",
            |v| v["defaults"] = json!({"scheduler": "plms"}),
            &["understudy.json", "scheduler", "plms", "dpm++"],
        ),
    ];
    for (file, change, named) in cases {
        let (_home, path) = folder(|_, _| {});
        edit(&path, file, change);
        let problem = problem(&path);
        for name in named {
            assert!(problem.contains(name), "{name} in: {problem}");
        }
        fs::write(path.join(file), "{\"cut").unwrap();
        assert!(self::problem(&path).contains(file), "{}", self::problem(&path));
    }
}

#[test]
fn a_folder_appears_whole_or_not_at_all() {
    let (home, path) = folder(|_, _| {});
    assert!(Draft::new(&path).is_err(), "what exists is not overwritten");
    let other = home.path().join("other");
    let draft = Draft::new(&other).unwrap();
    assert!(!other.exists());
    drop(draft);
    let left: Vec<_> = fs::read_dir(home.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["small"], "nothing is left of an abandoned draft");
}

#[test]
fn a_transformer_is_written_and_read_back() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("small");
    let config = json!({
        "_class_name": "DiTTransformer2DModel", "sample_size": 8, "in_channels": 1, "num_layers": 1,
        "num_attention_heads": 2, "attention_head_dim": 4, "num_embeds_ada_norm": 3,
    });
    let config = NetworkConfig::from_json(&config, "config.json").unwrap();
    let weights = config.initial_weights(1).unwrap().into_iter().collect();
    let schedule =
        ScheduleConfig::from_json(&json!({"_class_name": "DDIMScheduler"}), "scheduler").unwrap();
    let draft = Draft::new(&path).unwrap();
    ModelFolder::write(draft, &config, &weights, &schedule, &Card::default()).unwrap();
    assert!(path.join("transformer/diffusion_pytorch_model.safetensors").is_file());
    let opened = ModelFolder::open(&path).unwrap();
    assert_eq!((&opened.network, opened.card.null_class), (&config, None));
    assert_eq!(opened.load(DType::F32, &Device::Cpu).unwrap().network.geometry().width, 8);

    // Without a card, diffusers' own convention holds: the last class means "none".
    fs::remove_file(path.join("understudy.json")).unwrap();
    assert_eq!(ModelFolder::open(&path).unwrap().card.null_class, Some(3));

    edit(&path, "model_index.json", |index| {
        index["transformer"][1] = json!("FluxTransformer2DModel")
    });
    let problem = problem(&path);
    assert!(problem.contains("`transformer` is") && problem.contains("FluxTransformer2DModel"));
    assert!(problem.contains("DiTTransformer2DModel"), "{problem}");
}

#[test]
fn what_a_wrapper_put_before_the_names_is_taken_off() {
    for prefix in ["module.", "_orig_mod.", "model.module."] {
        let (_home, path) = folder(|weights, _| {
            *weights =
                weights.drain().map(|(name, tensor)| (format!("{prefix}{name}"), tensor)).collect();
        });
        assert!(
            ModelFolder::open(&path).unwrap().load(DType::F32, &Device::Cpu).is_ok(),
            "{prefix}"
        );
    }
    let (_home, path) = folder(|weights, _| {
        *weights = weights.drain().map(|(name, tensor)| (format!("mine.{name}"), tensor)).collect();
    });
    let problem = problem(&path);
    assert!(problem.contains("`mine.`") && problem.contains(WEIGHTS), "{problem}");
}

#[test]
fn what_makes_no_images_is_refused_by_field_where_images_are_wanted() {
    let refusal = |changes: Value| {
        let (_home, path) = folder(|_, _| {});
        edit(&path, "unet/config.json", |config| {
            for (field, value) in changes.as_object().unwrap() {
                config[field] = value.clone();
            }
        });
        fs::remove_file(path.join("understudy.json")).unwrap();
        assert!(ModelFolder::open(&path).is_ok());
        ModelFolder::open_for_images(&path).err().map(|error| error.to_string())
    };
    for channels in [1, 3] {
        for answered in [channels, 2 * channels] {
            let changes = json!({"in_channels": channels, "out_channels": answered});
            assert_eq!(refusal(changes), None);
        }
    }
    let none = json!(null);
    for (changes, field) in [
        (json!({"in_channels": 6, "out_channels": 3}), "in_channels"),
        (json!({"in_channels": 4, "out_channels": 4}), "in_channels"),
        (json!({"in_channels": 2, "out_channels": 2}), "in_channels"),
        (json!({"in_channels": 3, "out_channels": 4}), "out_channels"),
        (json!({"in_channels": 3, "out_channels": 1}), "out_channels"),
        (json!({"class_embed_type": "timestep", "num_class_embeds": none}), "class_embed_type"),
        (json!({"class_embed_type": "identity", "num_class_embeds": none}), "class_embed_type"),
    ] {
        let problem = refusal(changes.clone()).unwrap_or_else(|| panic!("{changes} is refused"));
        assert!(problem.contains(&format!("unet/config.json: {field}` is ")), "{problem}");
        assert!(problem.contains("makes no images"), "{problem}");
    }
}

#[cfg(unix)]
#[test]
fn sources_other_than_regular_files_are_refused_at_once() {
    for file in [
        "model_index.json",
        "unet/config.json",
        "scheduler/scheduler_config.json",
        "understudy.json",
        WEIGHTS,
    ] {
        for device in ["/dev/zero", "/dev/tty", "/proc/self/maps"] {
            if device == "/dev/tty" && !Path::new(device).exists() {
                continue;
            }
            let (_home, path) = folder(|_, _| {});
            fs::remove_file(path.join(file)).unwrap();
            std::os::unix::fs::symlink(device, path.join(file)).unwrap();
            let problem = problem(&path);
            assert!(
                problem.contains(file)
                    && (problem.contains("a device") || problem.contains("no file of a disk")),
                "{problem}"
            );
        }
    }
}

#[test]
fn a_header_longer_than_any_is_not_read() {
    let (_home, path) = folder(|_, _| {});
    let weights = fs::File::create(path.join(WEIGHTS)).unwrap();
    // Sparse: 90 GB that take no room.
    weights.set_len(90 << 30).unwrap();
    std::io::Write::write_all(&mut &weights, &(80u64 << 30).to_le_bytes()).unwrap();
    let problem = problem(&path);
    assert!(problem.contains(WEIGHTS) && problem.contains("its header has"), "{problem}");
}

#[test]
fn a_card_is_refused_by_field() {
    for (field, value, parts) in [
        ("role", json!("boss"), ["`role`", "boss"]),
        ("null_class", json!(4_294_967_296u64), ["`null_class`", "4294967296"]),
        ("null_class", json!(-1), ["`null_class`", "-1"]),
        ("class_names", json!(["a", 2, "c"]), ["`class_names[1]`", "2"]),
        ("class_names", json!("a"), ["`class_names`", "\"a\""]),
        (
            "defaults",
            json!({"num_inference_steps": "many"}),
            ["`defaults.num_inference_steps`", "many"],
        ),
        ("defaults", json!({"steps": 3}), ["`defaults.steps`", "unknown field"]),
        ("teacher", json!(["x"]), ["`teacher`", "sequence"]),
        ("mine", json!(1), ["`mine`", "unknown field"]),
    ] {
        let (_home, path) = folder(|_, _| {});
        edit(&path, "understudy.json", |card| card[field] = value.clone());
        let problem = problem(&path);
        assert!(parts.iter().all(|part| problem.contains(part)), "{field}: {problem}");
        assert!(problem.contains("understudy.json"), "{problem}");
    }
}

#[test]
fn numbers_that_f32_does_not_hold_are_refused_by_their_own_field() {
    for field in ["clip_sample_range", "sample_max_value"] {
        for value in [1e308, 1e-50, 0.0, -1.0] {
            let (_home, path) = folder(|_, _| {});
            edit(&path, "scheduler/scheduler_config.json", |scheduler| {
                scheduler[field] = json!(value)
            });
            let problem = problem(&path);
            assert!(problem.contains(&format!("scheduler_config.json: {field}` is ")), "{problem}");
        }
    }
    for (field, value) in [
        ("mid_block_scale_factor", 1e308),
        ("mid_block_scale_factor", 1e-300),
        ("norm_eps", 1e200),
        ("freq_shift", -1e300),
    ] {
        let (_home, path) = folder(|_, _| {});
        edit(&path, "unet/config.json", |config| config[field] = json!(value));
        let problem = problem(&path);
        assert!(problem.contains(&format!("unet/config.json: {field}` is ")), "{problem}");
    }
}
