//! Smaller networks out of a larger one's weights: what fitting them mends, what is kept, and what is refused.
#![allow(clippy::unwrap_used)]

mod common;

use std::path::Path;

use candle_core::{DType, Device};
use serde_json::{Value, json};
use understudy_distill::importance::Importance;
use understudy_distill::prune::{self, Fitted, Settings};
use understudy_distill::teacher::Teacher;
use understudy_distill::training_batch::BatchSource;
use understudy_models::NetworkConfig;
use understudy_models::checkpoint::{Draft, ModelFolder, card::Card};

const SETTINGS: Settings = Settings { share: 0.5, rows: 64, seed: 1 };

fn bundled(name: &str) -> Teacher {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/zoo").join(name);
    Teacher::open(&folder, name.into(), DType::F32, &Device::Cpu).unwrap()
}

/// The model's architecture with other fields.
fn with(model: &Teacher, more: &Value) -> NetworkConfig {
    let mut config = model.config.to_json();
    for (name, value) in more.as_object().unwrap() {
        config[name] = value.clone();
    }
    NetworkConfig::from_json(&config, "config.json").unwrap()
}

fn importance(model: &Teacher) -> Importance {
    let mut pool = prune::pool(model, SETTINGS.rows, SETTINGS.seed).unwrap();
    Importance::new(model, &model.weights().unwrap(), &mut pool, 1).unwrap().unwrap()
}

fn fitted(model: &Teacher, config: &NetworkConfig) -> Fitted {
    let mut pool = prune::pool(model, SETTINGS.rows, SETTINGS.seed).unwrap();
    while pool.prepare().unwrap().is_some() {}
    prune::fit(model, config, &importance(model), &mut pool, &SETTINGS).unwrap().unwrap()
}

#[test]
fn a_fitted_network_errs_less_and_its_folder_answers_the_same() {
    let model = bundled("fashion-mnist-student");
    let smaller = with(
        &model,
        &json!({
            "block_out_channels": [16, 24, 32], "norm_num_groups": 8, "add_attention": false,
            "down_block_types": ["DownBlock2D", "DownBlock2D", "DownBlock2D"],
        }),
    );
    let Fitted { weights, errors: [before, after], rows } = fitted(&model, &smaller);
    println!("mean square error in v: {before:.4} before, {after:.4} after");
    assert!(after < 0.5 * before && after.is_finite(), "{before} {after}");
    assert_eq!(rows, 64);

    let home = tempfile::tempdir().unwrap();
    let out = home.path().join("model");
    let weights = weights.into_iter().collect();
    let draft = Draft::new(&out).unwrap();
    ModelFolder::write(draft, &smaller, &weights, &model.schedule, &Card::default()).unwrap();
    let folder = ModelFolder::open(&out).unwrap();
    let written = folder.load(DType::F32, &Device::Cpu).unwrap().network;
    let network = smaller.load(weights, DType::F32, &Device::Cpu).unwrap();
    let mut pool = prune::pool(&model, 32, 2).unwrap();
    while pool.prepare().unwrap().is_some() {}
    let batch = pool.training_batch(0).unwrap();
    let [a, b] = [written.as_ref(), network.as_ref()].map(|network| {
        let answer = batch.ask(network).unwrap();
        answer.flatten_all().unwrap().to_vec1::<f32>().unwrap()
    });
    assert!(a == b);
}

#[test]
fn a_network_that_keeps_everything_keeps_its_answers() {
    let model = bundled("fashion-mnist-student");
    let Fitted { errors: [before, after], .. } = fitted(&model, &model.config);
    assert!(before < 1e-8 && after < 1e-6, "{before} {after}");
    let importance = importance(&model);
    assert_eq!(importance.lost(&importance.kept(&model.config).unwrap()), 0.0);
    assert!(importance.all() > 0.0);
}

#[test]
fn what_matters_falls_with_everything_that_is_left_out() {
    let model = bundled("fashion-mnist-student");
    let importance = importance(&model);
    let lost = |more: Value| importance.lost(&importance.kept(&with(&model, &more)).unwrap());
    let narrow = lost(json!({ "block_out_channels": [16, 24, 48], "norm_num_groups": 8 }));
    let narrower = lost(json!({ "block_out_channels": [16, 24, 32], "norm_num_groups": 8 }));
    assert!(0.0 < narrow && narrow < narrower, "{narrow} {narrower}");
    let plain = json!({ "add_attention": false });
    let no_middle = json!({ "add_attention": false, "mid_block_type": null });
    assert!(lost(plain) > 0.0 && lost(no_middle) > 0.0);
    // Levels of one width need no shortcut, and others than these are no part of the model.
    let others = [
        json!({ "block_out_channels": [16, 16, 48] }),
        json!({ "block_out_channels": [16, 64, 48] }),
        json!({ "layers_per_block": 2 }),
    ];
    for more in others {
        assert!(importance.kept(&with(&model, &more)).is_none(), "{more}");
    }
}

#[test]
fn levels_that_are_not_equally_wide_any_more_hand_on_what_both_keep() {
    let home = tempfile::tempdir().unwrap();
    let model = common::teacher(home.path());
    let smaller = with(&model, &json!({ "block_out_channels": [16, 8] }));
    let shortcut = "down_blocks.1.resnets.0.conv_shortcut.weight";
    assert!(!model.config.weight_shapes().contains_key(shortcut));
    let kept = importance(&model).kept(&smaller).unwrap();
    let narrow = kept.narrow(&model.weights().unwrap(), &smaller.weight_shapes()).unwrap();
    let rows: Vec<Vec<f32>> = narrow[shortcut].flatten_from(1).unwrap().to_vec2().unwrap();
    for row in rows {
        assert_eq!(row.iter().filter(|&&value| value == 1.0).count(), 1, "{row:?}");
        assert_eq!(row.iter().sum::<f32>(), 1.0);
    }
    let [before, after] = fitted(&model, &smaller).errors;
    assert!(after < before, "{before} {after}");
}

#[test]
fn what_cannot_be_reached_or_pruned_is_refused_with_the_remedy() {
    let refused = |model: &Teacher, share: f64| {
        let settings = Settings { share, ..SETTINGS };
        prune::prune(model, &settings, |_| {}).err().unwrap().to_string()
    };
    let model = bundled("fashion-mnist-student");
    let problem = refused(&model, 1e-6);
    // What it takes is the machine's to say.
    let told = problem.contains("ask for at least 0.") || problem.contains("nothing can be gained");
    assert!(problem.contains("0.000001x: the smallest network") && told, "{problem}");
    for share in [0.0, -1.0, 1.0, 2.0, f64::NAN] {
        assert!(refused(&model, share).contains("above 0 and below 1"), "{share}");
    }
    let home = tempfile::tempdir().unwrap();
    let (network, schedule) = (common::transformer(16, &json!({})), common::schedule(&json!({})));
    let folder = common::folder(home.path(), "tokens", &network, &schedule);
    let tokens = Teacher::open(&folder, "tokens".into(), DType::F32, &Device::Cpu).unwrap();
    let problem = refused(&tokens, 0.5);
    assert!(
        problem.contains("a DiTTransformer2DModel")
            && problem.contains("U-Nets that see no prompt"),
        "{problem}"
    );
}
