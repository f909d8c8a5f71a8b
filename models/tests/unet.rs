//! The U-Net against diffusers, against itself in other batches, and against files that do not fit.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::HashMap;
use std::path::PathBuf;

use candle_core::{DType, Device, Tensor, Var};
use common::{Golden, bits, digest_in_process, formula, print_digest, relative_error};
use serde_json::{Value, json};
use understudy_models::kernels::Isa;
use understudy_models::{Denoiser, NetworkConfig};

impl Golden {
    fn named(name: &str) -> Self {
        Self::read("unet", name)
    }

    fn all() -> Vec<Self> {
        let all = Self::read_all("unet");
        assert!(all.len() >= 10, "only {} files", all.len());
        all
    }

    fn config(&self) -> NetworkConfig {
        NetworkConfig::from_json(&self.config, "config.json").unwrap()
    }

    fn model(&self) -> Box<dyn Denoiser> {
        self.model_in(DType::F32)
    }

    fn model_in(&self, dtype: DType) -> Box<dyn Denoiser> {
        let weights = self.weights.clone();
        self.config().load(weights, dtype, &Device::Cpu).unwrap()
    }

    fn condition(&self) -> Option<Tensor> {
        self.condition_for(&self.config().geometry())
    }
}

#[test]
fn answers_as_diffusers_does() {
    for golden in Golden::all() {
        let model = golden.model();
        let condition = golden.condition();
        let output = model.forward(&golden.x, &golden.timesteps, condition.as_ref()).unwrap();
        let error = relative_error(&output, &golden.output);
        println!("{}: {error:.2e}", golden.name);
        assert!(error <= 1e-4, "{}: relative error {error:e}", golden.name);
    }
}

/// The kernels choose their instructions once per process, so each set needs a process of its own: this
/// test runs the ones above and below again.
#[test]
fn every_instruction_set_answers_as_diffusers_does() {
    for isa in Isa::available() {
        let names = ["answers_as_diffusers_does", "a_row_does_not_depend_on_its_batch"];
        let output = std::process::Command::new(std::env::current_exe().unwrap())
            .arg("--exact")
            .args(names)
            .env("UNDERSTUDY_ISA", isa.to_string())
            .output()
            .unwrap();
        assert!(output.status.success(), "{isa}: {}", String::from_utf8_lossy(&output.stdout));
    }
}

/// The Frobenius norm of the difference, relative to that of `expected`.
fn frobenius(found: &Tensor, expected: &Tensor) -> f64 {
    let norm = |t: &Tensor| t.sqr().unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap().sqrt();
    let found = found.to_dtype(DType::F64).unwrap();
    norm(&(found - expected).unwrap()) / norm(expected)
}

/// Against the same network of candle's operations in f64 (time embedding projected in f32 by both).
#[test]
fn the_compiled_network_errs_by_less_than_3e_5() {
    let in_f64 = |tensor: &Tensor| tensor.to_dtype(DType::F64).unwrap();
    let load = |config: &NetworkConfig, weights: HashMap<String, Tensor>, dtype| {
        config.load(weights, dtype, &Device::Cpu).unwrap()
    };
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("zoo/fashion-mnist-teacher/unet");
    let json = std::fs::read(folder.join("config.json")).unwrap();
    let json: Value = serde_json::from_slice(&json).unwrap();
    let config = NetworkConfig::from_json(&json, "config.json").unwrap();
    let file = folder.join("diffusion_pytorch_model.safetensors");
    let weights = candle_core::safetensors::load(file, &Device::Cpu).unwrap();
    let x = formula(&[3, 1, 32, 32], 1.7, 1);
    let t = Tensor::new(&[1f32, 500., 999.], &Device::Cpu).unwrap();
    let labels = Tensor::new(&[0u32, 4, 9], &Device::Cpu).unwrap();
    let found = load(&config, weights.clone(), DType::F32).forward(&x, &t, Some(&labels)).unwrap();
    let reference = load(&config, weights, DType::F64);
    let expected = reference.forward(&in_f64(&x), &t, Some(&labels)).unwrap();
    let error = frobenius(&found, &expected);
    println!("teacher: {error:.2e}");
    assert!(error <= 3e-5, "teacher: {error:e}");

    for golden in Golden::all() {
        let condition = golden.condition();
        let (x, t) = (&golden.x, &golden.timesteps);
        let found = golden.model().forward(x, t, condition.as_ref()).unwrap();
        let reference = load(&golden.config(), golden.weights.clone(), DType::F64);
        let expected = reference.forward(&in_f64(x), t, condition.as_ref()).unwrap();
        let error = frobenius(&found, &expected);
        println!("{}: {error:.2e}", golden.name);
        assert!(error <= 3e-5, "{}: {error:e}", golden.name);
    }
}

/// What the network's products may be of on this processor.
fn dtypes() -> Vec<DType> {
    let bf16 = Isa::detect().multiplies_bf16().then_some(DType::BF16);
    std::iter::once(DType::F32).chain(bf16).collect()
}

/// Eight bits of mantissa throughout; PyTorch's autocast errs by as much (`benches/peers`).
#[test]
fn bf16_answers_nearly_as_diffusers_does() {
    if !dtypes().contains(&DType::BF16) {
        println!("this processor does not multiply bf16: nothing compared");
        return;
    }
    for golden in Golden::all() {
        let model = golden.model_in(DType::BF16);
        assert_eq!(model.dtype(), DType::F32, "what it takes and gives");
        let condition = golden.condition();
        let output = model.forward(&golden.x, &golden.timesteps, condition.as_ref()).unwrap();
        let error = frobenius(&output, &golden.output.to_dtype(DType::F64).unwrap());
        println!("{}: {error:.2e}", golden.name);
        assert!(error <= 3e-2, "{}: relative error {error:e}", golden.name);
    }
}

/// In a process of its own, with an instruction set that lacks it.
#[test]
fn bf16_is_refused_where_the_processor_does_not_multiply_it() {
    const CHILD: &str = "UNDERSTUDY_TEST_REFUSE_BF16";
    if std::env::var_os(CHILD).is_some() {
        let golden = Golden::named("ddpm");
        let weights = golden.weights.clone();
        let model = golden.config().load(weights, DType::BF16, &Device::Cpu);
        let message = model.err().unwrap().to_string();
        assert!(message.contains("does not multiply bf16"), "{message}");
        assert!(message.contains("use f32"), "{message}");
        return;
    }
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "bf16_is_refused_where_the_processor_does_not_multiply_it"])
        .env(CHILD, "1")
        .env("UNDERSTUDY_ISA", "portable")
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}

#[test]
fn a_row_does_not_depend_on_its_batch() {
    let models = Golden::all().into_iter().flat_map(|golden| {
        let golden = std::rc::Rc::new(golden);
        dtypes().into_iter().map(move |dtype| (golden.clone(), golden.model_in(dtype)))
    });
    for (golden, model) in models {
        let condition = golden.condition();
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

/// A network wide enough for the product's threads and blocks to matter, with weights by formula.
fn wide(dtype: DType) -> (Box<dyn Denoiser>, Tensor, Tensor) {
    let config = json!({
        "sample_size": 16, "block_out_channels": [32, 160], "layers_per_block": 1,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"], "attention_head_dim": 32,
        "time_embedding_dim": 1100,
    });
    let config = NetworkConfig::from_json(&config, "config.json").unwrap();
    let model = config.load(formula_weights(&config), dtype, &Device::Cpu);
    let x = formula(&[8, 3, 16, 16], 1.0, 17);
    let t = Tensor::new(&[0f32, 3., 77., 250., 499., 500., 731., 999.], &Device::Cpu).unwrap();
    (model.unwrap(), x, t)
}

fn formula_weights(config: &NetworkConfig) -> HashMap<String, Tensor> {
    let shapes = config.weight_shapes();
    let weight = |(i, (name, shape)): (usize, (String, Vec<usize>))| {
        let fan_in: usize = shape[1..].iter().product();
        (name, formula(&shape, (3.0 / fan_in as f32).sqrt(), i as u32))
    };
    shapes.into_iter().enumerate().map(weight).collect()
}

#[test]
fn threads_and_neighbours_do_not_change_a_wide_network() {
    let pool = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    for dtype in dtypes() {
        let (model, x, t) = wide(dtype);
        let one = pool(1);
        let expected = one.install(|| bits(&model.forward(&x, &t, None).unwrap()));
        for threads in [2, 3, 4, 7] {
            let found = pool(threads).install(|| bits(&model.forward(&x, &t, None).unwrap()));
            assert!(found == expected, "{dtype:?}: {threads} threads");
        }
        for row in 0..8 {
            let (x, t) = (x.narrow(0, row, 1).unwrap(), t.narrow(0, row, 1).unwrap());
            let found = bits(&model.forward(&x, &t, None).unwrap());
            let together = &expected[row * found.len()..][..found.len()];
            assert!(found[..] == *together, "{dtype:?}: row {row} alone");
        }
    }
}

#[test]
fn the_process_thread_count_does_not_change_a_wide_network() {
    const CHILD: &str = "UNDERSTUDY_TEST_PRINT_DIGEST";
    if std::env::var_os(CHILD).is_some() {
        let (model, x, t) = wide(DType::F32);
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
        let config = golden.config();
        let written = config.to_json();
        assert_eq!(NetworkConfig::from_json(&written, "config.json").unwrap(), config);
        for (field, value) in golden.config.as_object().unwrap() {
            let same = written[field] == *value
                || written[field].as_f64().is_some_and(|number| value.as_f64() == Some(number))
                // What diffusers reads as the same thing.
                || ["downsample_type", "upsample_type", "act_fn"].contains(&&field[..])
                || field.ends_with("block_types")
                || field == "_diffusers_version";
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
fn legacy_attention_names_load() {
    let mut golden = Golden::named("ddpm");
    let model = golden.model();
    golden.weights = std::mem::take(&mut golden.weights)
        .into_iter()
        .map(|(name, tensor)| {
            let old = name
                .replace(".to_q.", ".query.")
                .replace(".to_k.", ".key.")
                .replace(".to_v.", ".value.")
                .replace(".to_out.0.", ".proj_attn.");
            (old, tensor)
        })
        .collect();
    assert!(golden.weights.contains_key("mid_block.attentions.0.proj_attn.weight"));
    let answer =
        |model: &dyn Denoiser| bits(&model.forward(&golden.x, &golden.timesteps, None).unwrap());
    assert!(answer(&*golden.model()) == answer(&*model));
}

/// Loads `golden` expecting a refusal, and returns what it says.
fn refusal(golden: &Golden) -> String {
    let weights = golden.weights.clone();
    match golden.config().load(weights, DType::F32, &Device::Cpu) {
        Ok(_) => panic!("the weights were accepted"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn weights_that_do_not_fit_are_named() {
    let mut golden = Golden::named("adm");
    golden.weights.remove("mid_block.resnets.1.conv2.bias");
    golden.weights.insert("ema.decay".into(), Tensor::zeros(7, DType::F32, &Device::Cpu).unwrap());
    let wrong = Tensor::zeros((8, 3, 1, 1), DType::F32, &Device::Cpu).unwrap();
    golden.weights.insert("conv_in.weight".into(), wrong);
    let message = refusal(&golden);
    for part in [
        "1 missing: `mid_block.resnets.1.conv2.bias` [16]",
        "1 not of this network: `ema.decay` [7]",
        "1 of another shape: `conv_in.weight` is [8, 3, 1, 1], not [8, 3, 3, 3]",
    ] {
        assert!(message.contains(part), "{message}");
    }

    golden.weights.clear();
    let message = refusal(&golden);
    let count = golden.config().weight_shapes().len();
    assert!(message.contains(&format!("{count} missing:")), "{message}");
    assert!(message.contains(&format!("and {} more", count - 8)), "{message}");
}

#[test]
fn every_value_that_cannot_be_honoured_is_refused_by_name() {
    let base = Golden::named("ddpm").config;
    let cases = [
        ("_class_name", json!("UNet3DConditionModel")),
        ("sample_size", json!(null)),
        ("sample_size", json!(0)),
        ("sample_size", json!(7)),
        ("sample_size", json!([8, 4, 2])),
        ("sample_size", json!([8, 5])),
        ("sample_size", json!("8")),
        ("sample_size", json!(1u64 << 40)),
        ("sample_size", json!(16384)),
        ("in_channels", json!(0)),
        ("in_channels", json!(-1)),
        ("in_channels", json!(3.5)),
        ("out_channels", json!(u64::MAX)),
        ("center_input_sample", json!("yes")),
        ("time_embedding_type", json!("sinus")),
        ("time_embedding_type", json!(null)),
        ("num_train_timesteps", json!(0)),
        ("time_embedding_dim", json!(-4)),
        ("freq_shift", json!("1")),
        ("freq_shift", json!(4)),
        ("down_block_types", json!(["DownBlock2D"])),
        ("down_block_types[1]", json!(["DownBlock2D", "SkipDownBlock2D"])),
        ("down_block_types[0]", json!(["CrossAttnDownBlock2D", "DownBlock2D"])),
        ("down_block_types[0]", json!(["UpBlock2D", "DownBlock2D"])),
        ("up_block_types", json!("UpBlock2D")),
        ("up_block_types[1]", json!(["UpBlock2D", "AttnSkipUpBlock2D"])),
        ("up_block_types[0]", json!([3, "UpBlock2D"])),
        ("mid_block_type", json!("UNetMidBlock2DCrossAttn")),
        ("block_out_channels", json!([])),
        ("block_out_channels", json!([8, 16, 32])),
        ("block_out_channels[1]", json!([8, 18])),
        ("block_out_channels[0]", json!([0, 16])),
        ("block_out_channels", json!([65536, 65536])),
        ("layers_per_block", json!(0)),
        ("layers_per_block", json!([1, 2])),
        ("layers_per_block", json!(1_000_000)),
        ("mid_block_scale_factor", json!(0)),
        ("downsample_padding", json!(2)),
        ("downsample_padding", json!(null)),
        ("downsample_type", json!("fir")),
        ("upsample_type", json!("")),
        ("dropout", json!(2.0)),
        ("act_fn", json!("geglu")),
        ("attention_head_dim", json!(3)),
        ("attention_head_dim", json!(32)),
        ("attention_head_dim", json!(0)),
        ("norm_num_groups", json!(null)),
        ("norm_num_groups", json!(0)),
        ("attn_norm_num_groups", json!(5)),
        ("norm_eps", json!(-1.0)),
        ("resnet_time_scale_shift", json!("ada_group")),
        ("resnet_time_scale_shift", json!("spatial")),
        ("add_attention", json!(1)),
        ("class_embed_type", json!("projection")),
        ("num_class_embeds", json!(0)),
    ];
    for (field, value) in cases {
        let mut config = base.clone();
        let member = field.split('[').next().unwrap();
        config[member] = value.clone();
        let error = NetworkConfig::from_json(&config, "unet/config.json");
        let message = error.expect_err(&format!("{field} = {value}")).to_string();
        // Some lists are refused for the sake of another field that they no longer match.
        let named = message.starts_with(&format!("`unet/config.json: {field}` is "))
            || (value == json!([8, 16, 32]) && message.contains("down_block_types"))
            || (value == json!([8, 18]) && message.contains("block_out_channels[1]"));
        assert!(named, "{field} = {value}: {message}");
    }

    let mut learned = base.clone();
    learned["time_embedding_type"] = json!("learned");
    let message = NetworkConfig::from_json(&learned, "c").unwrap_err().to_string();
    assert!(message.contains("num_train_timesteps"), "{message}");
    for not_an_object in [json!([]), json!(null), json!(3)] {
        assert!(NetworkConfig::from_json(&not_an_object, "c").is_err());
    }
    let mut unknown = base;
    unknown["flux_capacitor"] = json!(1.21);
    NetworkConfig::from_json(&unknown, "c").unwrap();
}

#[test]
fn wrong_inputs_are_errors() {
    let golden = Golden::named("adm");
    let model = golden.model();
    let (x, t) = (&golden.x, &golden.timesteps);
    let labels = golden.condition().unwrap();
    let fails = |x: &Tensor, t: &Tensor, labels: Option<&Tensor>| {
        model.forward(x, t, labels).unwrap_err().to_string()
    };
    assert!(fails(x, t, None).contains("condition"));
    assert!(fails(x, &t.narrow(0, 0, 2).unwrap(), Some(&labels)).contains("timesteps"));
    assert!(fails(&x.narrow(2, 0, 4).unwrap(), t, Some(&labels)).contains("x is"));
    let none = x.narrow(0, 0, 0).unwrap();
    assert!(fails(&none, &t.narrow(0, 0, 0).unwrap(), Some(&labels)).contains("x is"));
    fails(x, t, Some(&Tensor::new(&[0u32, 1, 5], &Device::Cpu).unwrap()));

    let golden = Golden::named("learned");
    let t = Tensor::new(&[0.5f32, 1., 2.], &Device::Cpu).unwrap();
    let error = golden.model().forward(&golden.x, &t, None).unwrap_err().to_string();
    assert!(error.contains("timestep 0.5"), "{error}");
}

/// `Σ output·direction`, whose gradient the next test compares.
fn loss(model: &dyn Denoiser, golden: &Golden, direction: &Tensor) -> Tensor {
    let condition = golden.condition();
    let y = model.forward(&golden.x, &golden.timesteps, condition.as_ref()).unwrap();
    (y * direction).unwrap().sum_all().unwrap()
}

#[test]
fn every_weight_has_the_gradient_that_differences_show() {
    for name in ["adm", "mixed", "ddpm"] {
        let golden = Golden::named(name);
        let vars: HashMap<String, Var> = golden
            .weights
            .iter()
            .map(|(name, tensor)| (name.clone(), Var::from_tensor(tensor).unwrap()))
            .collect();
        let weights = vars.iter().map(|(name, var)| (name.clone(), var.as_tensor().clone()));
        let model = golden.config().load(weights.collect(), DType::F32, &Device::Cpu);
        let model = model.unwrap();
        let direction = formula(golden.output.dims(), 1.0, 5);
        let grads = loss(&*model, &golden, &direction).backward().unwrap();
        for (i, (name, var)) in vars.iter().enumerate() {
            let grad = grads.get(var).unwrap_or_else(|| panic!("{name} has no gradient"));
            let before = var.as_tensor().copy().unwrap();
            let along = formula(before.dims(), 1.0, 100 + i as u32);
            let slope = (grad * &along).unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap();
            let size = grad.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt()
                * along.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
            let step = 2e-3;
            let at = |offset: f64| {
                var.set(&(&before + (&along * offset).unwrap()).unwrap()).unwrap();
                loss(&*model, &golden, &direction).to_scalar::<f32>().unwrap()
            };
            let difference = (at(step) - at(-step)) / (2.0 * step as f32);
            var.set(&before).unwrap();
            let error = (slope - difference).abs();
            assert!(
                error <= 0.02 * size + 0.02,
                "{name}: {slope} against {difference}, |g| {size}"
            );
        }
    }
}

/// Gradients of `Σ output·direction` with respect to all weights, and to `x`, on the CPU.
fn gradients(golden: &Golden, dtype: DType) -> HashMap<String, Tensor> {
    gradients_on(&Device::Cpu, golden, [dtype; 2])
}

/// The same on a device, of a network of one type whose weights are of another.
fn gradients_on(
    device: &Device,
    golden: &Golden,
    [dtype, of_weights]: [DType; 2],
) -> HashMap<String, Tensor> {
    let to = |tensor: &Tensor, dtype| tensor.to_device(device).unwrap().to_dtype(dtype).unwrap();
    let var = |tensor: &Tensor, dtype| Var::from_tensor(&to(tensor, dtype)).unwrap();
    let mut vars: HashMap<String, Var> = golden
        .weights
        .iter()
        .map(|(name, tensor)| (name.clone(), var(tensor, of_weights)))
        .collect();
    let weights = vars.iter().map(|(name, var)| (name.clone(), var.as_tensor().clone())).collect();
    let model = golden.config().load(weights, dtype, device).unwrap();
    let x = var(&golden.x, dtype);
    let condition = golden.condition().map(|condition| condition.to_device(device).unwrap());
    let timesteps = golden.timesteps.to_device(device).unwrap();
    let y = model.forward(&x, &timesteps, condition.as_ref()).unwrap();
    let direction = to(&formula(golden.output.dims(), 1.0, 5), dtype);
    let loss = (y * direction).unwrap().sum_all().unwrap();
    let grads = loss.backward().unwrap();
    vars.insert("x".to_string(), x);
    let found = vars.iter().map(|(name, var)| {
        let grad = grads.get(var).unwrap_or_else(|| panic!("{name} has no gradient"));
        (name.clone(), grad.to_device(&Device::Cpu).unwrap())
    });
    found.collect()
}

/// All gradients' distance from those of f64, in their norm.
#[cfg(feature = "cuda")]
fn distance(found: &HashMap<String, Tensor>, expected: &HashMap<String, Tensor>) -> f64 {
    let norm = |t: &Tensor| t.sqr().unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap();
    let (mut wrong, mut all) = (0.0, 0.0);
    for (name, expected) in expected {
        wrong += norm(&(found[name].to_dtype(DType::F64).unwrap() - expected).unwrap());
        all += norm(expected);
    }
    (wrong / all).sqrt()
}

/// The gradient that is furthest from that of f64, and how far; where a gradient is nothing but rounding, as that of a
/// key's bias, against the size of all.
fn worst(found: &HashMap<String, Tensor>, expected: &HashMap<String, Tensor>) -> (f64, String) {
    let norm = |t: &Tensor| t.sqr().unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap();
    let all = expected.values().map(norm).sum::<f64>().sqrt();
    let mut worst = (0.0, String::new());
    for (name, expected) in expected {
        let difference = (found[name].to_dtype(DType::F64).unwrap() - expected).unwrap();
        let error = norm(&difference).sqrt() / (norm(expected).sqrt() + 1e-3 * all);
        if error > worst.0 || error.is_nan() {
            worst = (error, name.clone());
        }
    }
    worst
}

/// Against candle's own gradients of the same network in f64.
#[test]
fn the_compiled_gradients_are_those_of_f64() {
    for golden in Golden::all() {
        let (found, expected) = (gradients(&golden, DType::F32), gradients(&golden, DType::F64));
        let (error, name) = worst(&found, &expected);
        println!("{}: {error:.2e} in {name}", golden.name);
        assert!(error <= 1e-4, "{}: {error:e} in {name}", golden.name);
    }
}

#[cfg(feature = "cuda")]
#[test]
#[ignore = "needs a GPU, or one in software"]
fn on_a_gpu_answers_are_those_of_diffusers_and_gradients_those_of_f64() {
    let device = Device::new_cuda(0).unwrap();
    let to = |tensor: &Tensor| tensor.to_device(&device).unwrap();
    for golden in Golden::all() {
        let expected = gradients(&golden, DType::F64);
        for (dtype, limit, of_gradients) in
            [(DType::F32, 1e-4, 1e-5), (DType::F16, 1e-2, 1e-2), (DType::BF16, 0.1, 5e-2)]
        {
            let weights = golden.weights.clone();
            let model = golden.config().load(weights, dtype, &device).unwrap();
            let x = to(&golden.x).to_dtype(dtype).unwrap();
            let condition = golden.condition().map(|condition| to(&condition));
            let output = model.forward(&x, &to(&golden.timesteps), condition.as_ref()).unwrap();
            let output = output.to_dtype(DType::F32).unwrap().to_device(&Device::Cpu).unwrap();
            let error = relative_error(&output, &golden.output);
            let found = gradients_on(&device, &golden, [dtype, DType::F32]);
            let (distance, (furthest, name)) =
                (distance(&found, &expected), worst(&found, &expected));
            let what = format!("{} {dtype:?}", golden.name);
            println!("{what}: {error:.2e}, gradients {distance:.2e}, {furthest:.2e} in {name}");
            assert!(error <= limit, "{what}: relative error {error:e}");
            assert!(distance <= of_gradients, "{what}: {distance:e}");
            assert!(furthest <= 1e-4 || dtype != DType::F32, "{what}: {furthest:e} in {name}");
        }
    }
}

#[test]
fn threads_do_not_change_a_training_step() {
    let pool = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    for name in ["adm", "mixed", "ddpm"] {
        let golden = Golden::named(name);
        let step = || -> Vec<(String, Vec<u32>)> {
            let mut all: Vec<_> = gradients(&golden, DType::F32)
                .into_iter()
                .map(|(name, gradient)| (name, bits(&gradient)))
                .collect();
            all.sort();
            all
        };
        let expected = pool(1).install(step);
        for threads in [2, 3, 7] {
            assert!(pool(threads).install(step) == expected, "{name}: {threads} threads");
        }
    }
}

#[test]
fn the_gradient_of_one_evaluation_is_taken_once() {
    let golden = Golden::named("ddpm");
    let vars: Vec<(String, Var)> = golden
        .weights
        .iter()
        .map(|(name, tensor)| (name.clone(), Var::from_tensor(tensor).unwrap()))
        .collect();
    let weights = vars.iter().map(|(name, var)| (name.clone(), var.as_tensor().clone())).collect();
    let model = golden.config().load(weights, DType::F32, &Device::Cpu).unwrap();
    let evaluate = || {
        let condition = golden.condition();
        model.forward(&golden.x, &golden.timesteps, condition.as_ref()).unwrap().sum_all().unwrap()
    };
    let (first, second) = (evaluate(), evaluate());
    let bits_of = |loss: &Tensor| {
        let grads = loss.backward().unwrap();
        vars.iter().map(|(_, var)| bits(grads.get(var).unwrap())).collect::<Vec<_>>()
    };
    // Two evaluations wait side by side, and both can be in one loss.
    let both = bits_of(&(&evaluate() + &evaluate()).unwrap());
    assert!(bits_of(&first) == bits_of(&second));
    assert!(both != bits_of(&evaluate()));
    let message = first.backward().unwrap_err().to_string();
    assert!(message.contains("evaluate the network again"), "{message}");
}
