//! The transformer against diffusers and PyTorch, against itself in other batches, and against files that
//! do not fit.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor, Var};
use common::{Golden, bits, digest_in_process, formula, print_digest, relative_error};
use serde_json::{Value, json};
use understudy_models::dit::DiTConfig;
use understudy_models::kernels::Isa;
use understudy_models::{Conditioning, Denoiser, NetworkConfig};

impl Golden {
    fn named(name: &str) -> Self {
        Self::read("dit", name)
    }

    fn all() -> Vec<Self> {
        let all = Self::read_all("dit");
        assert!(all.len() >= 6, "only {} files", all.len());
        all
    }

    fn config(&self) -> NetworkConfig {
        NetworkConfig::from_json(&self.config, "config.json").unwrap()
    }

    fn model(&self) -> Box<dyn Denoiser> {
        self.config().load(self.weights.clone(), DType::F32, &Device::Cpu).unwrap()
    }

    fn condition(&self) -> Option<Tensor> {
        self.condition_for(&self.config().geometry())
    }
}

#[test]
fn answers_as_diffusers_does() {
    for golden in Golden::all() {
        let condition = golden.condition();
        let output = golden.model().forward(&golden.x, &golden.timesteps, condition.as_ref());
        let error = relative_error(&output.unwrap(), &golden.output);
        println!("{}: {error:.2e}", golden.name);
        assert!(error <= 1e-5, "{}: relative error {error:e}", golden.name);
    }
}

/// The kernels choose their instructions once per process.
#[test]
fn every_instruction_set_answers_as_diffusers_does() {
    for isa in Isa::available() {
        let names = [
            "answers_as_diffusers_does",
            "a_row_does_not_depend_on_its_batch",
            "gradients_are_those_of_pytorch",
        ];
        let output = std::process::Command::new(std::env::current_exe().unwrap())
            .arg("--exact")
            .args(names)
            .env("UNDERSTUDY_ISA", isa.to_string())
            .output()
            .unwrap();
        assert!(output.status.success(), "{isa}: {}", String::from_utf8_lossy(&output.stdout));
    }
}

/// In f64, of candle's operations, nothing is left but what diffusers works out in f32 itself: the phases of
/// the time, whose last bits differ between libraries.
#[test]
fn in_f64_only_the_times_phases_err() {
    let in_f64 = |tensor: &Tensor| tensor.to_dtype(DType::F64).unwrap();
    for golden in Golden::all() {
        let model = golden.config().load(golden.weights.clone(), DType::F64, &Device::Cpu).unwrap();
        let condition = golden.condition();
        let output = model.forward(&in_f64(&golden.x), &golden.timesteps, condition.as_ref());
        let error = relative_error(&output.unwrap().to_dtype(DType::F32).unwrap(), &golden.output);
        println!("{}: {error:.2e}", golden.name);
        assert!(error <= 5e-6, "{}: relative error {error:e}", golden.name);
    }
}

/// Where a gradient is nothing but rounding, as that of a key's bias, it is held against the size of all.
#[test]
fn gradients_are_those_of_pytorch() {
    let norm = |t: &Tensor| t.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
    for golden in Golden::all() {
        let vars: HashMap<String, Var> = golden
            .weights
            .iter()
            .map(|(name, tensor)| (name.clone(), Var::from_tensor(tensor).unwrap()))
            .collect();
        let weights = vars.iter().map(|(name, var)| (name.clone(), var.as_tensor().clone()));
        let model = golden.config().load(weights.collect(), DType::F32, &Device::Cpu).unwrap();
        let (x, condition) = (Var::from_tensor(&golden.x).unwrap(), golden.condition());
        let y = model.forward(&x, &golden.timesteps, condition.as_ref()).unwrap();
        let loss = (y * &golden.more["direction"]).unwrap().sum_all().unwrap();
        let grads = loss.backward().unwrap();

        let expected = |name: &str| &golden.more[&format!("gradients/{name}")];
        let all = vars.keys().map(|name| norm(expected(name)).powi(2)).sum::<f32>().sqrt();
        let pairs = vars.iter().map(|(name, var)| (name.as_str(), var, expected(name)));
        let mut worst = (0.0, String::new());
        for (name, var, expected) in pairs.chain([("x", &x, &golden.more["gradient/x"])]) {
            let found = grads.get(var).unwrap_or_else(|| panic!("{name} has no gradient"));
            let error = norm(&(found - expected).unwrap()) / (norm(expected) + 1e-3 * all);
            if error > worst.0 || error.is_nan() {
                worst = (error, name.to_string());
            }
        }
        println!("{}: {:.2e} in {}", golden.name, worst.0, worst.1);
        assert!(worst.0 <= 2e-5, "{}: {:e} in {}", golden.name, worst.0, worst.1);
    }
}

#[test]
fn a_row_does_not_depend_on_its_batch() {
    for golden in Golden::all() {
        let (model, condition) = (golden.model(), golden.condition());
        let forward = |rows: &[u32]| {
            let rows = Tensor::new(rows, &Device::Cpu).unwrap();
            let pick = |tensor: &Tensor| tensor.index_select(&rows, 0).unwrap();
            let condition = condition.as_ref().map(pick);
            let y = model.forward(&pick(&golden.x), &pick(&golden.timesteps), condition.as_ref());
            y.unwrap()
        };
        let alone: Vec<_> = (0..3).map(|row| bits(&forward(&[row]))).collect();
        for batch in [vec![1, 0], vec![0, 1, 2], vec![2, 1, 0, 0, 1, 2, 2, 1], vec![1; 17]] {
            let y = forward(&batch);
            for (i, &row) in batch.iter().enumerate() {
                let together = bits(&y.get(i).unwrap());
                assert!(together == alone[row as usize], "{}: row {i} of {batch:?}", golden.name);
            }
        }
    }
}

/// A network wide enough for the products' threads and blocks to matter, and what it is asked.
fn wide() -> (Box<dyn Denoiser>, Tensor, Tensor) {
    let config = json!({
        "_class_name": "DiTTransformer2DModel", "sample_size": 32, "patch_size": 4, "in_channels": 1,
        "num_layers": 2, "num_attention_heads": 6, "attention_head_dim": 36, "num_embeds_ada_norm": 0,
    });
    let config = NetworkConfig::from_json(&config, "config.json").unwrap();
    let weight = |(i, (name, shape)): (usize, (String, Vec<usize>))| {
        let fan_in: usize = shape[1..].iter().product();
        (name, formula(&shape, (3.0 / fan_in as f32).sqrt(), i as u32))
    };
    let weights = config.weight_shapes().into_iter().enumerate().map(weight).collect();
    let model = config.load(weights, DType::F32, &Device::Cpu).unwrap();
    let t = Tensor::new(&[0f32, 3., 77., 250., 499., 500., 731., 999.], &Device::Cpu).unwrap();
    (model, formula(&[8, 1, 32, 32], 1.0, 17), t)
}

#[test]
fn threads_and_neighbours_do_not_change_a_wide_network() {
    let pool = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    let (model, x, t) = wide();
    let expected = pool(1).install(|| bits(&model.forward(&x, &t, None).unwrap()));
    for threads in [2, 3, 4, 7] {
        let found = pool(threads).install(|| bits(&model.forward(&x, &t, None).unwrap()));
        assert!(found == expected, "{threads} threads");
    }
    for row in 0..8 {
        let (x, t) = (x.narrow(0, row, 1).unwrap(), t.narrow(0, row, 1).unwrap());
        let found = bits(&model.forward(&x, &t, None).unwrap());
        assert!(found[..] == expected[row * found.len()..][..found.len()], "row {row} alone");
    }
}

#[test]
fn the_process_thread_count_does_not_change_a_wide_network() {
    const CHILD: &str = "UNDERSTUDY_TEST_PRINT_DIGEST";
    if std::env::var_os(CHILD).is_some() {
        let (model, x, t) = wide();
        print_digest(&model.forward(&x, &t, None).unwrap());
        return;
    }
    let test = "the_process_thread_count_does_not_change_a_wide_network";
    let one = digest_in_process(test, CHILD, "1");
    for threads in ["2", "5"] {
        assert_eq!(digest_in_process(test, CHILD, threads), one, "{threads} threads");
    }
}

#[test]
fn config_survives_a_round_trip() {
    for golden in Golden::all() {
        let written = golden.config().to_json();
        assert_eq!(NetworkConfig::from_json(&written, "config.json").unwrap(), golden.config());
        for (field, value) in golden.config.as_object().unwrap() {
            // The second has no effect in this class.
            let same = written[field] == *value
                || ["_diffusers_version", "norm_num_groups"].contains(&&field[..]);
            assert!(same, "{}: {field}: {value} became {}", golden.name, written[field]);
        }
    }
}

#[test]
fn weight_shapes_are_those_of_diffusers() {
    for golden in Golden::all() {
        let shapes = golden.config().weight_shapes();
        assert_eq!(shapes.len(), golden.weights.len(), "{}", golden.name);
        for (name, shape) in &shapes {
            assert_eq!(golden.weights[name].dims(), &shape[..], "{name}");
        }
        let count: usize = shapes.values().map(|shape| shape.iter().product::<usize>()).sum();
        assert_eq!(golden.model().parameters(), count);
    }
}

#[test]
fn classes_are_the_rows_of_the_table() {
    let conditioning = |name| Golden::named(name).config().geometry().conditioning;
    assert_eq!(conditioning("classes"), Conditioning::Classes(5));
    assert_eq!(conditioning("unconditional"), Conditioning::None);
    assert_eq!(Golden::named("classes").config().null_class(), Some(4));
    assert_eq!(Golden::named("unconditional").config().null_class(), None);
}

#[test]
fn weights_that_do_not_fit_are_named() {
    let mut golden = Golden::named("classes");
    golden.weights.remove("transformer_blocks.1.attn1.to_out.0.bias");
    let wrong = Tensor::zeros((4, 16), DType::F32, &Device::Cpu).unwrap();
    let table = "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight";
    golden.weights.insert(table.into(), wrong);
    let loaded = golden.config().load(golden.weights, DType::F32, &Device::Cpu);
    let message = loaded.err().unwrap().to_string();
    assert!(message.contains("1 missing: `transformer_blocks.1.attn1.to_out.0.bias` [16]"));
    assert!(message.contains(&format!("`{table}` is [4, 16], not [5, 16]")), "{message}");
}

/// Eight bits of mantissa throughout, where the processor multiplies them.
#[test]
fn bf16_answers_nearly_as_diffusers_does() {
    if !Isa::detect().multiplies_bf16() {
        println!("this processor does not multiply bf16: nothing compared");
        return;
    }
    for golden in Golden::all() {
        let weights = golden.weights.clone();
        let network = golden.config().load(weights, DType::BF16, &Device::Cpu).unwrap();
        let condition = golden.condition();
        let output = network.forward(&golden.x, &golden.timesteps, condition.as_ref()).unwrap();
        let error = relative_error(&output, &golden.output);
        println!("{}: {error:.2e}", golden.name);
        assert!(error <= 3e-2, "{}: {error:e}", golden.name);
    }
}

#[test]
fn every_value_that_cannot_be_honoured_is_refused_by_name() {
    let base = Golden::named("classes").config;
    let cases: &[(&str, Value)] = &[
        ("_class_name", json!("Transformer2DModel")),
        ("num_attention_heads", json!(0)),
        ("num_attention_heads", json!(null)),
        ("attention_head_dim", json!(7)),
        ("attention_head_dim", json!(1 << 16)),
        ("in_channels", json!(0)),
        ("in_channels", json!(-1)),
        ("out_channels", json!("6")),
        ("num_layers", json!(0)),
        ("num_layers", json!(1_000)),
        ("dropout", json!(2.0)),
        ("attention_bias", json!(1)),
        ("sample_size", json!(null)),
        ("sample_size", json!([8, 8])),
        ("sample_size", json!(1u64 << 40)),
        ("sample_size", json!(16384)),
        ("patch_size", json!(3)),
        ("patch_size", json!(16)),
        ("activation_fn", json!("geglu")),
        ("activation_fn", json!(null)),
        ("num_embeds_ada_norm", json!(null)),
        ("num_embeds_ada_norm", json!(-1)),
        ("num_embeds_ada_norm", json!(1.5)),
        ("upcast_attention", json!("no")),
        ("norm_type", json!("layer_norm")),
        ("norm_elementwise_affine", json!(true)),
        ("norm_eps", json!(-1.0)),
    ];
    for (field, value) in cases {
        let mut config = base.clone();
        config[field] = value.clone();
        let error = DiTConfig::from_json(&config, "transformer/config.json");
        let message = error.expect_err(&format!("{field} = {value}")).to_string();
        let named = message.starts_with(&format!("`transformer/config.json: {field}` is "));
        assert!(named, "{field} = {value}: {message}");
    }
    let mut unknown = base;
    unknown["flux_capacitor"] = json!(1.21);
    DiTConfig::from_json(&unknown, "c").unwrap();
}

#[test]
fn wrong_inputs_are_errors() {
    let golden = Golden::named("classes");
    let (model, x, t) = (golden.model(), &golden.x, &golden.timesteps);
    let labels = golden.condition().unwrap();
    let fails = |x: &Tensor, t: &Tensor, labels: Option<&Tensor>| {
        model.forward(x, t, labels).unwrap_err().to_string()
    };
    assert!(fails(x, t, None).contains("condition"));
    assert!(fails(x, &t.narrow(0, 0, 2).unwrap(), Some(&labels)).contains("timesteps"));
    assert!(fails(&x.narrow(2, 0, 4).unwrap(), t, Some(&labels)).contains("x is"));
    // Five rows: four classes and none.
    fails(x, t, Some(&Tensor::new(&[0u32, 1, 5], &Device::Cpu).unwrap()));
}

/// A new network answers with zeros, and its first step moves only what makes it answer.
#[test]
fn a_new_network_is_nothing_yet() {
    let config = Golden::named("classes").config();
    let weights = config.initial_weights(1).unwrap();
    let values =
        |name: &str| -> Vec<f32> { weights[name].flatten_all().unwrap().to_vec1().unwrap() };
    let bound = (6.0f32 / 32.0).sqrt();
    let query = values("transformer_blocks.0.attn1.to_q.weight");
    assert!(query.iter().all(|value| value.abs() < bound));
    assert!(query.iter().any(|value| value.abs() > 0.9 * bound));
    assert!(values("transformer_blocks.1.norm1.linear.weight").iter().all(|value| *value == 0.0));
    let model = config.load(weights.into_iter().collect(), DType::F32, &Device::Cpu).unwrap();
    let golden = Golden::named("classes");
    let y = model.forward(&golden.x, &golden.timesteps, golden.condition().as_ref()).unwrap();
    assert!(bits(&y).iter().all(|bits| bits << 1 == 0));
}

#[test]
fn a_scaled_network_has_as_many_narrower_heads() {
    let half = Golden::named("odd").config().scaled(0.5).unwrap().to_json();
    assert_eq!((&half["num_attention_heads"], &half["attention_head_dim"]), (&json!(3), &json!(8)));
    assert!(Golden::named("odd").config().channels().is_none());
}
