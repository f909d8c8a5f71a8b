//! Autoencoders against diffusers, against themselves in other batches, and configurations that cannot be honoured.
#![allow(clippy::unwrap_used)]

#[path = "common/described.rs"]
mod described;
#[path = "common/numbers.rs"]
mod numbers;

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};
use described::{Described, weights};
use numbers::{bits, formula, relative_error};
use serde_json::{Value, json};
use understudy_models::autoencoder::{AutoencoderConfig, Decoder, Encoder};
use understudy_models::kernels::Isa;

/// As in `golden/make_autoencoders.py`.
const LATENT_SEED: u32 = 1_000_001;
const IMAGE_SEED: u32 = 1_000_002;
const ROWS: usize = 2;

struct Case {
    golden: Described,
    config: AutoencoderConfig,
    /// Height and width of a latent.
    size: [usize; 2],
}

impl Case {
    fn all() -> Vec<Self> {
        let all: Vec<Self> = Described::all("autoencoder").into_iter().map(Self::of).collect();
        assert!(all.len() >= 8, "only {} files", all.len());
        all
    }

    fn of(golden: Described) -> Self {
        let config = AutoencoderConfig::from_json(&golden.config, "config.json").unwrap();
        let size = serde_json::from_str(&golden.metadata["size"]).unwrap();
        Self { golden, config, size }
    }

    fn weights(&self) -> HashMap<String, Tensor> {
        weights(&self.config.weight_shapes())
    }

    fn decoder(&self, dtype: DType) -> Decoder {
        self.config.decoder(self.weights(), self.size, dtype, &Device::Cpu).unwrap()
    }

    fn encoder(&self, dtype: DType) -> Encoder {
        let image = self.size.map(|side| side * self.config.factor());
        self.config.encoder(self.weights(), image, dtype, &Device::Cpu).unwrap()
    }

    fn latents(&self) -> Tensor {
        let [height, width] = self.size;
        formula(&[ROWS, self.config.latent_channels(), height, width], 2.0, LATENT_SEED)
    }

    fn images(&self, encoder: &Encoder) -> Tensor {
        let [channels, height, width] = encoder.image_shape();
        formula(&[ROWS, channels, height, width], 1.0, IMAGE_SEED)
    }
}

fn to(tensor: &Tensor, dtype: DType) -> Tensor {
    tensor.to_dtype(dtype).unwrap()
}

/// Of the compiled halves in f32, and of candle's operations in f64.
#[test]
fn both_halves_are_those_of_diffusers() {
    for case in Case::all() {
        for dtype in [DType::F32, DType::F64] {
            let compare = |what: &str, found: &Tensor| {
                let error = relative_error(&to(found, DType::F32), case.golden.tensor(what));
                println!("{} {what} {dtype:?}: {error:.2e}", case.golden.name);
                assert!(error <= 1e-5, "{} {what} {dtype:?}: {error:e}", case.golden.name);
            };
            let image = case.decoder(dtype).forward(&to(&case.latents(), dtype)).unwrap();
            compare("image", &image);
            let encoder = case.encoder(dtype);
            let images = to(&case.images(&encoder), dtype);
            let posterior = encoder.forward(&images).unwrap();
            compare("mode", posterior.mode());
            let ones = posterior.mode().ones_like().unwrap();
            let drawn = posterior.sample(&ones).unwrap();
            let deviation = (drawn - posterior.mode()).unwrap();
            match case.golden.tensors.get("deviation") {
                Some(_) => compare("deviation", &deviation),
                None => assert_eq!(
                    to(&deviation, DType::F32)
                        .abs()
                        .unwrap()
                        .max_all()
                        .unwrap()
                        .to_scalar::<f32>()
                        .unwrap(),
                    0.0
                ),
            }
        }
    }
}

/// Rows closer to each other than this, relative to how near the nearer is, may be told apart otherwise in f32.
const GAP: f32 = 1e-5;

/// A row of the table snaps to itself, so the image of the rows that diffusers finds is that of the latents, to the bit.
#[test]
fn latents_snap_to_the_rows_that_diffusers_finds() {
    let mut compared = 0;
    for case in Case::all() {
        let Some(codes) = case.golden.tensors.get("codes") else { continue };
        let gap = case.golden.tensor("gap").flatten_all().unwrap().min(0).unwrap();
        assert!(gap.to_scalar::<f32>().unwrap() > GAP, "{}: a tie", case.golden.name);
        let scale = case.config.to_json()["scaling_factor"].as_f64().unwrap();
        let table = &case.weights()["quantize.embedding.weight"];
        let rows = codes.to_dtype(DType::U32).unwrap().flatten_all().unwrap();
        let [height, width] = case.size;
        let found = table.index_select(&rows, 0).unwrap().reshape((ROWS, height, width, ()));
        let latents = (found.unwrap().permute((0, 3, 1, 2)).unwrap() * scale).unwrap();
        let decoder = case.decoder(DType::F32);
        let image = bits(&decoder.forward(&latents).unwrap());
        assert!(image == bits(&decoder.forward(&case.latents()).unwrap()), "{}", case.golden.name);
        compared += 1;
    }
    assert_eq!(compared, 2);
}

#[test]
fn a_decoder_is_had_at_other_sizes() {
    for case in Case::all() {
        for dtype in [DType::F32, DType::F64] {
            let decoder = case.decoder(dtype);
            let other = decoder.at([6, 9]).unwrap();
            let [channels, ..] = other.latent_shape();
            let latents = to(&formula(&[2, channels, 6, 9], 2.0, 5), dtype);
            let alone = case.config.decoder(case.weights(), [6, 9], dtype, &Device::Cpu).unwrap();
            assert_eq!(other.image_shape(), alone.image_shape());
            let image = |decoder: &Decoder| to(&decoder.forward(&latents).unwrap(), DType::F32);
            let error = relative_error(&image(&other), &image(&alone));
            assert!(error <= 1e-5, "{} {dtype:?}: {error:e}", case.golden.name);
            let back = other.at(case.size).unwrap();
            let latents = to(&case.latents(), dtype);
            let image =
                |decoder: &Decoder| bits(&to(&decoder.forward(&latents).unwrap(), DType::F32));
            assert!(image(&back) == image(&decoder), "{} {dtype:?}", case.golden.name);
            assert!(decoder.at([0, 1]).is_err());
        }
    }
}

/// The kernels choose their instructions once per process, so each set needs a process of its own.
#[test]
fn every_instruction_set_is_as_good() {
    for isa in Isa::available() {
        let names = ["both_halves_are_those_of_diffusers", "a_row_does_not_depend_on_its_batch"];
        let output = std::process::Command::new(std::env::current_exe().unwrap())
            .arg("--exact")
            .args(names)
            .env("UNDERSTUDY_ISA", isa.to_string())
            .output()
            .unwrap();
        assert!(output.status.success(), "{isa}: {}", String::from_utf8_lossy(&output.stdout));
    }
}

/// What the products may be of on this processor.
fn dtypes() -> Vec<DType> {
    let bf16 = Isa::detect().multiplies_bf16().then_some(DType::BF16);
    std::iter::once(DType::F32).chain(bf16).collect()
}

#[test]
fn bf16_is_nearly_as_diffusers() {
    for dtype in dtypes().into_iter().filter(|&dtype| dtype == DType::BF16) {
        for case in Case::all() {
            let image = case.decoder(dtype).forward(&case.latents()).unwrap();
            let norm =
                |t: &Tensor| t.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
            let expected = case.golden.tensor("image");
            let error = norm(&(image - expected).unwrap()) / norm(expected);
            println!("{}: {error:.2e}", case.golden.name);
            assert!(error <= 3e-2, "{}: {error:e}", case.golden.name);
        }
    }
}

#[test]
fn a_row_does_not_depend_on_its_batch() {
    for case in Case::all() {
        for dtype in dtypes() {
            let (decoder, encoder) = (case.decoder(dtype), case.encoder(dtype));
            let (latents, images) = (case.latents(), case.images(&encoder));
            let pick = |tensor: &Tensor, rows: &[u32]| {
                tensor.index_select(&Tensor::new(rows, &Device::Cpu).unwrap(), 0).unwrap()
            };
            let decoded = |rows: &[u32]| decoder.forward(&pick(&latents, rows)).unwrap();
            let encoded =
                |rows: &[u32]| encoder.forward(&pick(&images, rows)).unwrap().mode().clone();
            let alone: Vec<_> =
                (0..2).map(|row| (bits(&decoded(&[row])), bits(&encoded(&[row])))).collect();
            let rows = [1, 0, 0, 1, 1];
            let (together, coded) = (decoded(&rows), encoded(&rows));
            for (i, &row) in rows.iter().enumerate() {
                let (image, code) = &alone[row as usize];
                let name = &case.golden.name;
                assert!(bits(&together.get(i).unwrap()) == *image, "{name}: image {i}");
                assert!(bits(&coded.get(i).unwrap()) == *code, "{name}: latent {i}");
            }
        }
    }
}

/// However many they are, and whatever is decoded between them.
#[test]
fn an_image_does_not_depend_on_the_stretches_that_it_is_decoded_in() {
    for case in Case::all() {
        let decoder = case.decoder(DType::F32);
        let latents = case.latents();
        let whole = bits(&decoder.forward(&latents).unwrap());
        for stretches in [1, 2, 3, 7, 1000] {
            let mut decodings = [&latents, &(&latents * 0.5).unwrap(), &latents]
                .map(|latents| decoder.begin(latents, stretches).unwrap());
            for done in 1..=stretches {
                let images = decodings.each_mut().map(|it| decoder.go_on(it).unwrap());
                if stretches < 10 {
                    assert!(bits(&decoder.forward(&latents).unwrap()) == whole);
                }
                match images {
                    [Some(one), Some(half), Some(two)] => {
                        assert_eq!(done, stretches);
                        assert!(bits(&one) == whole && bits(&two) == whole, "{}", case.golden.name);
                        assert!(bits(&half) != whole);
                    }
                    [None, None, None] => assert!(done < stretches),
                    _ => panic!("all end at once"),
                }
            }
            let message = decoder.go_on(&mut decodings[0]).unwrap_err().to_string();
            assert!(message.contains("has ended"), "{message}");
        }
    }
}

#[test]
fn a_configuration_survives_a_round_trip() {
    for case in Case::all() {
        let written = case.config.to_json();
        assert_eq!(AutoencoderConfig::from_json(&written, "config.json").unwrap(), case.config);
        for (field, value) in case.golden.config.as_object().unwrap() {
            let same = written[field] == *value
                || written[field].as_f64().is_some_and(|number| value.as_f64() == Some(number))
                || field == "_diffusers_version";
            assert!(same, "{}: {field}: {value} became {}", case.golden.name, written[field]);
        }
    }
}

#[test]
fn old_names_of_attention_load() {
    let case = Case::all().into_iter().find(|case| case.golden.name == "kl_emoji").unwrap();
    let old = |name: &str| {
        name.replace(".to_q.", ".query.")
            .replace(".to_k.", ".key.")
            .replace(".to_v.", ".value.")
            .replace(".to_out.0.", ".proj_attn.")
    };
    let named: HashMap<String, Tensor> =
        case.weights().into_iter().map(|(name, weight)| (old(&name), weight)).collect();
    assert!(named.contains_key("decoder.mid_block.attentions.0.proj_attn.weight"));
    let decoder = case.config.decoder(named, case.size, DType::F32, &Device::Cpu).unwrap();
    let image = decoder.forward(&case.latents()).unwrap();
    assert!(bits(&image) == bits(&case.decoder(DType::F32).forward(&case.latents()).unwrap()));
}

#[test]
fn weights_and_sizes_that_do_not_fit_are_named() {
    let case = Case::all().into_iter().find(|case| case.golden.name == "vq_celebahq").unwrap();
    let refusal = |weights, size| match case.config.decoder(weights, size, DType::F32, &Device::Cpu)
    {
        Ok(_) => panic!("it was accepted"),
        Err(error) => error.to_string(),
    };
    let mut weights = case.weights();
    weights.remove("quantize.embedding.weight");
    let message = refusal(weights, case.size);
    assert!(message.contains("1 missing: `quantize.embedding.weight` [512, 3]"), "{message}");
    let message = refusal(case.weights(), [0, 8]);
    assert!(message.contains("`latent size` is 0×8"), "{message}");
    let encoder = case.config.encoder(case.weights(), [30, 32], DType::F32, &Device::Cpu);
    let message = encoder.err().unwrap().to_string();
    assert!(
        message.contains("`image size` is 30×32: height and width must be multiples of 4"),
        "{message}"
    );
    let wrong = Tensor::zeros((1, 4, 8, 8), DType::F32, &Device::Cpu).unwrap();
    let message = case.decoder(DType::F32).forward(&wrong).unwrap_err().to_string();
    assert!(message.contains("latents are F32 [1, 4, 8, 8], not F32 [B, 3, 8, 8]"), "{message}");
}

#[test]
fn every_value_that_cannot_be_honoured_is_refused_by_name() {
    let kl = |more: Value| merged(json!({"_class_name": "AutoencoderKL"}), more);
    let vq = |more: Value| merged(json!({"_class_name": "VQModel"}), more);
    let tiny = |more: Value| merged(json!({"_class_name": "AutoencoderTiny"}), more);
    let cases = [
        (
            json!({"_class_name": "AutoencoderDC"}),
            "`config.json: _class_name` is \"AutoencoderDC\": must be one of",
        ),
        (json!([]), "the file must hold one JSON object"),
        (kl(json!({"latents_mean": [0.1]})), "`config.json: latents_mean` is [0.1]: must be null"),
        (kl(json!({"latents_std": [1.0]})), "`config.json: latents_std` is [1.0]: must be null"),
        (
            kl(json!({"act_fn": "tanh"})),
            "`config.json: act_fn` is \"tanh\": cannot be honoured: unknown variant",
        ),
        (
            kl(json!({"down_block_types": ["AttnDownEncoderBlock2D"]})),
            "`config.json: down_block_types[0]` is \"AttnDownEncoderBlock2D\": cannot be honoured",
        ),
        (
            kl(json!({"up_block_types": []})),
            "`config.json: up_block_types` is []: must have as many",
        ),
        (
            kl(json!({"block_out_channels": []})),
            "`config.json: block_out_channels` is []: must have 1 to",
        ),
        (
            kl(json!({"block_out_channels": [33]})),
            "`config.json: block_out_channels[0]` is 33: must be a multiple",
        ),
        (kl(json!({"norm_num_groups": 0})), "`config.json: norm_num_groups` is 0"),
        (
            kl(json!({"norm_num_groups": null})),
            "`config.json: norm_num_groups` is null: cannot be honoured",
        ),
        (
            kl(json!({"layers_per_block": -1})),
            "`config.json: layers_per_block` is -1: cannot be honoured",
        ),
        (
            kl(json!({"latent_channels": 0})),
            "`config.json: latent_channels` is 0: must be a whole number",
        ),
        (kl(json!({"scaling_factor": 0})), "`config.json: scaling_factor` is 0: must be"),
        (kl(json!({"scaling_factor": 1e300})), "`config.json: scaling_factor` is 1e+300: must be"),
        (kl(json!({"shift_factor": 1e300})), "`config.json: shift_factor` is 1e+300: must be"),
        (kl(json!({"patch": 2})), "`config.json: patch` is 2: cannot be honoured: unknown field"),
        (
            vq(json!({"norm_type": "spatial"})),
            "`config.json: norm_type` is \"spatial\": cannot be honoured",
        ),
        (vq(json!({"num_vq_embeddings": 0})), "`config.json: num_vq_embeddings` is 0: must be"),
        (vq(json!({"vq_embed_dim": 0})), "`config.json: vq_embed_dim` is 0: must be"),
        (tiny(json!({"upsample_fn": "bilinear"})), "`config.json: upsample_fn` is \"bilinear\""),
        (
            tiny(json!({"upsampling_scaling_factor": 4})),
            "`config.json: upsampling_scaling_factor` is 4: must be 2",
        ),
        (
            tiny(json!({"encoder_block_out_channels": [64, 32, 64, 64]})),
            "`config.json: encoder_block_out_channels[1]` is 32: must be 64",
        ),
        (
            tiny(json!({"num_decoder_blocks": [1]})),
            "`config.json: num_decoder_blocks` is [1]: must have as many",
        ),
        (
            tiny(json!({"encoder_block_out_channels": [64], "num_encoder_blocks": [1]})),
            "`config.json: decoder_block_out_channels` is absent: must have as many",
        ),
    ];
    for (config, expected) in cases {
        let message = AutoencoderConfig::from_json(&config, "config.json").unwrap_err().to_string();
        assert!(message.contains(expected), "{config}: {message}");
    }
}

fn merged(mut object: Value, more: Value) -> Value {
    for (name, value) in more.as_object().unwrap() {
        object[name] = value.clone();
    }
    object
}
