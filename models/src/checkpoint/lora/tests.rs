//! Names of all programs, merging against plain sums, and what is refused. `models/tests/lora.rs` has the parity with diffusers.

use super::*;
use candle_core::Device;

fn shapes() -> Shapes {
    let linear = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight";
    let out = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0.weight";
    let names = [
        (linear, vec![6, 4]),
        (out, vec![4, 6]),
        ("down_blocks.0.resnets.0.conv1.weight", vec![4, 3, 3, 3]),
        ("down_blocks.0.resnets.0.norm1.weight", vec![4]),
        ("up_blocks.0.resnets.0.norm1.weight", vec![4]),
        ("up_blocks.0.resnets.1.norm1.weight", vec![4]),
        ("mid_block.attentions.0.proj_in.weight", vec![4, 4, 1, 1]),
    ];
    names.into_iter().map(|(name, shape)| (name.to_owned(), shape)).collect()
}

fn random(seed: u64, shape: &[usize]) -> Tensor {
    let mut values = vec![0.0; shape.iter().product()];
    crate::noise::normal(seed, 0, &mut values);
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

fn file(tensors: &[(&str, Tensor)]) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    let tensors: HashMap<&str, Tensor> =
        tensors.iter().map(|(name, tensor)| (*name, tensor.clone())).collect();
    candle_core::safetensors::save(&tensors, file.path()).unwrap();
    file
}

fn merged(lora: &Lora, name: &str, weight: &Tensor) -> Tensor {
    let targets = targets(Component::Network, &shapes());
    lora.check(&[&targets]).unwrap();
    let mut weights = HashMap::from([(name.to_owned(), Weight::Here(weight.clone()))]);
    lora.merge(&targets, &mut weights);
    weights.remove(name).unwrap().take().unwrap()
}

fn distance(a: &Tensor, b: &Tensor) -> f32 {
    (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar().unwrap()
}

#[test]
fn every_programs_names_mean_the_same_weight() {
    let name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight";
    let (up, down, weight) = (random(1, &[6, 2]), random(2, &[2, 4]), random(3, &[6, 4]));
    let flat = "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q";
    let module = name.strip_suffix(".weight").unwrap();
    let attention = module.strip_suffix(".to_q").unwrap();
    let there = "input_blocks_1_1_transformer_blocks_0_attn1_to_q";
    for [up_name, down_name] in [
        [format!("lora_unet_{flat}.lora_up.weight"), format!("lora_unet_{flat}.lora_down.weight")],
        [
            format!("lora_unet_{there}.lora_up.weight"),
            format!("lora_unet_{there}.lora_down.weight"),
        ],
        [format!("unet.{module}.lora_B.weight"), format!("unet.{module}.lora_A.weight")],
        [format!("{module}.lora_B.default.weight"), format!("{module}.lora_A.default.weight")],
        [
            format!("base_model.model.{module}.lora_B.weight"),
            format!("base_model.model.{module}.lora_A.weight"),
        ],
        [format!("unet.{module}.lora.up.weight"), format!("unet.{module}.lora.down.weight")],
        [
            format!("unet.{attention}.processor.to_q_lora.up.weight"),
            format!("unet.{attention}.processor.to_q_lora.down.weight"),
        ],
    ] {
        let file = file(&[(&up_name, up.clone()), (&down_name, down.clone())]);
        let lora = Lora::open(file.path(), 0.5).unwrap();
        let expected = (&weight + (up.matmul(&down).unwrap() * 0.5).unwrap()).unwrap();
        assert!(distance(&merged(&lora, name, &weight), &expected) < 1e-6, "{up_name}");
    }
}

#[test]
fn alpha_convolutions_and_half_types() {
    let alpha = Tensor::new(1.0f32, &Device::Cpu).unwrap();
    let (up, down) = (random(1, &[4, 2, 1, 1]), random(2, &[2, 3, 3, 3]));
    let conv = "lora_unet_down_blocks_0_resnets_0_conv1";
    let file_ = file(&[
        (&format!("{conv}.lora_up.weight"), up.to_dtype(DType::F16).unwrap()),
        (&format!("{conv}.lora_down.weight"), down.to_dtype(DType::F16).unwrap()),
        (&format!("{conv}.alpha"), alpha),
    ]);
    let lora = Lora::open(file_.path(), 3.0).unwrap();
    let weight = random(3, &[4, 3, 3, 3]);
    let halves =
        [&up, &down].map(|it| it.to_dtype(DType::F16).unwrap().to_dtype(DType::F32).unwrap());
    let [up, down] = halves.map(|it| it.flatten_from(1).unwrap());
    // alpha/rank = 1/2, times the scale.
    let added = (up.matmul(&down).unwrap() * 1.5).unwrap().reshape((4, 3, 3, 3)).unwrap();
    let expected = (&weight + added).unwrap();
    let name = "down_blocks.0.resnets.0.conv1.weight";
    assert!(distance(&merged(&lora, name, &weight), &expected) < 1e-5);
    let half = merged(&lora, name, &weight.to_dtype(DType::F16).unwrap());
    assert_eq!(half.dtype(), DType::F16);
    let none = lora.scaled(0.0).unwrap();
    assert_eq!(distance(&merged(&none, name, &weight), &weight), 0.0);
}

#[test]
fn what_fits_nothing_is_refused_by_its_name() {
    let (up, down) = (random(1, &[6, 2]), random(2, &[2, 4]));
    let q = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q";
    let a = format!("{q}.lora_A.weight");
    let b = format!("{q}.lora_B.weight");
    let empty = Tensor::zeros((0, 4), DType::F32, &Device::Cpu).unwrap();
    let wide = Tensor::zeros((6, 0), DType::F32, &Device::Cpu).unwrap();
    let nan = (&up * f64::NAN).unwrap();
    type Case<'a> = (&'a [(&'a str, Tensor)], &'a [&'a str]);
    let cases: [Case; 10] = [
        (&[(&b, up.clone())], &["has no down"]),
        (&[(&a, down.clone())], &["has no up"]),
        (&[(&b, wide), (&a, empty)], &["rank of at least 1"]),
        (&[(&b, up.clone()), (&a, random(2, &[3, 4]))], &["[6, 2]", "[3, 4]"]),
        (&[(&b, nan), (&a, down.clone())], &["NaN"]),
        (&[("unet.x.hada_w1_a", up.clone())], &["LoHa"]),
        (&[("unet.x.lora_magnitude_vector", up.clone())], &["DoRA"]),
        (&[("conv_in.weight", up.clone())], &["conv_in.weight", "no tensor of a LoRA"]),
        (&[(&b, random(1, &[6, 2])), (&a, random(2, &[2, 5]))], &["[6, 4]", "made for"]),
        (
            &[
                ("unet.other.to_q.lora_B.weight", up.clone()),
                ("unet.other.to_q.lora_A.weight", down.clone()),
            ],
            &["unet.other.to_q", "fits no weight"],
        ),
    ];
    let targets = targets(Component::Network, &shapes());
    for (tensors, parts) in cases {
        let file = file(tensors);
        let lora = Lora::open(file.path(), 1.0).and_then(|lora| lora.check(&[&targets]));
        let problem = lora.unwrap_err().to_string();
        assert!(parts.iter().all(|part| problem.contains(part)), "{problem}");
    }
    let missing = Lora::open(Path::new("no/such.safetensors"), 1.0).unwrap_err().to_string();
    assert!(
        missing.contains("no/such.safetensors") && !missing.contains("save_pretrained"),
        "{missing}"
    );
    let file = file(&[(&b, up), (&a, down)]);
    for scale in [f64::NAN, f64::INFINITY, 101.0] {
        let problem = Lora::open(file.path(), scale).unwrap_err().to_string();
        assert!(problem.contains("scale"), "{problem}");
    }
}

/// Stable Diffusion XL has two, whose weights have the same names.
#[test]
fn each_text_encoder_has_a_name_of_its_own() {
    let name = "encoder.layers.0.mlp.fc1.weight";
    let shapes = Shapes::from([(name.to_owned(), vec![6, 4])]);
    let encoders = [0, 1].map(|number| targets(Component::TextEncoder(number), &shapes));
    let (up, down, weight) = (random(1, &[6, 2]), random(2, &[2, 4]), random(3, &[6, 4]));
    for (names, changed) in [
        (["lora_te1_text_model_encoder_layers_0_mlp_fc1", "lora_up", "lora_down"], 0),
        (["lora_te2_text_model_encoder_layers_0_mlp_fc1", "lora_up", "lora_down"], 1),
        (["text_encoder.text_model.encoder.layers.0.mlp.fc1", "lora_B", "lora_A"], 0),
        (["text_encoder_2.text_model.encoder.layers.0.mlp.fc1", "lora_B", "lora_A"], 1),
    ] {
        let [module, first, second] = names;
        let file = file(&[
            (&format!("{module}.{first}.weight"), up.clone()),
            (&format!("{module}.{second}.weight"), down.clone()),
        ]);
        let lora = Lora::open(file.path(), 1.0).unwrap();
        lora.check(&encoders.iter().collect::<Vec<_>>()).unwrap();
        for (number, encoder) in encoders.iter().enumerate() {
            assert_eq!(lora.changes(encoder), number == changed, "{module}");
            let mut weights = HashMap::from([(name.to_owned(), Weight::Here(weight.clone()))]);
            lora.merge(encoder, &mut weights);
            let made = weights.remove(name).unwrap().take().unwrap();
            let product = up.matmul(&down).unwrap();
            let expected =
                if number == changed { (&weight + product).unwrap() } else { weight.clone() };
            assert!(distance(&made, &expected) <= 1e-6, "{module}");
        }
    }
}
