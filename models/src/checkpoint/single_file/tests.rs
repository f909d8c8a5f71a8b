//! Against what diffusers' own scripts say of every tensor (`models/tests/golden/make_single_files.py`), and the whole way with
//! small networks.

use super::*;
use crate::checkpoint::ModelFolder;
use crate::text::clip::ClipTokenizer;
use candle_core::Device;
use serde::Deserialize;

#[derive(Deserialize)]
struct Table {
    unet: Vec<[String; 3]>,
    vae: Vec<[String; 3]>,
    text_encoder: Vec<[String; 3]>,
    #[serde(default)]
    text_encoder_2: Vec<[String; 3]>,
}

impl Table {
    /// Rows of each component, in the order of [`FOLDERS`].
    fn rows(&self) -> [&Vec<[String; 3]>; 4] {
        [&self.unet, &self.vae, &self.text_encoder, &self.text_encoder_2]
    }
}

const FOLDERS: [&str; 4] = ["unet", "vae", "text_encoder", "text_encoder_2"];

fn table(family: &str) -> Table {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    crate::checkpoint::read::json(&golden.join(format!("single_file_{family}.json"))).unwrap()
}

fn unet_json(family: &str, channels: &[usize], context: usize) -> Value {
    let linear = family != "1";
    let heads = |&channels: &usize| if linear { (channels / 64).max(1) } else { 8 };
    let heads: Vec<usize> = channels.iter().map(heads).collect();
    let (down, up) = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D");
    let mut config = json!({
        "_class_name": "UNet2DConditionModel",
        "sample_size": 64,
        "down_block_types": [down, down, down, "DownBlock2D"],
        "up_block_types": ["UpBlock2D", up, up, up],
        "block_out_channels": channels,
        "cross_attention_dim": context,
        "attention_head_dim": heads,
        "use_linear_projection": linear,
    });
    if family == "xl" {
        config["down_block_types"] = json!(["DownBlock2D", down, down]);
        config["up_block_types"] = json!([up, up, "UpBlock2D"]);
        config["transformer_layers_per_block"] = json!([1, 2, 10]);
        config["addition_embed_type"] = json!("text_time");
        config["addition_time_embed_dim"] = json!(256);
        config["projection_class_embeddings_input_dim"] =
            json!(1536 + if channels[0] == 320 { 1280 } else { 64 });
    }
    config
}

fn vae_json(channels: [usize; 4]) -> Value {
    json!({
        "_class_name": "AutoencoderKL",
        "block_out_channels": channels,
        "layers_per_block": 2,
        "down_block_types": vec!["DownEncoderBlock2D"; 4],
        "up_block_types": vec!["UpDecoderBlock2D"; 4],
    })
}

/// The text encoders, with their classes: of such widths and depths.
fn text_jsons(family: &str, all: &[(usize, usize)]) -> Vec<(&'static str, Value)> {
    let of = |(number, &(width, layers)): (usize, &(usize, usize))| {
        let open = family == "2" || number == 1;
        let mut config = json!({
            "vocab_size": 49_408,
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": (width / 64).max(1),
            "hidden_act": if open { "gelu" } else { "quick_gelu" },
        });
        if number == 0 {
            return ("CLIPTextModel", config);
        }
        config["projection_dim"] = json!(width);
        ("CLIPTextModelWithProjection", config)
    };
    all.iter().enumerate().map(of).collect()
}

/// Names here with their shapes, of each component.
fn shapes_here(unet: &Value, vae: &Value, texts: &[(&str, Value)]) -> Vec<Shapes> {
    let mut all = vec![
        NetworkConfig::from_json(unet, "unet").unwrap().weight_shapes(),
        AutoencoderConfig::from_json(vae, "vae").unwrap().weight_shapes(),
    ];
    all.extend(texts.iter().map(|(class, text)| {
        as_in_files(ClipConfig::from_json(class, text, "text").unwrap().weight_shapes())
    }));
    all
}

fn as_in_files(shapes: Shapes) -> Shapes {
    shapes.into_iter().map(|(name, shape)| (file_name(&name), shape)).collect()
}

/// The file's tensors for those here, by the golden tables, and what each is made of.
fn shapes_there(table: &Table, here: &[Shapes]) -> Shapes {
    let mut there = Shapes::new();
    for (rows, here) in table.rows().into_iter().zip(here) {
        for [name, source, how] in rows {
            let Some(mut shape) = here.get(name).cloned() else { continue };
            match how.as_str() {
                "same" => {}
                "point" => shape.extend([1, 1]),
                "transposed" => shape.reverse(),
                _ => shape[0] *= 3,
            }
            there.insert(source.clone(), shape);
        }
    }
    there
}

#[test]
fn every_tensor_of_the_real_models_is_where_diffusers_finds_it() {
    for (family, channels, context, texts, heads) in [
        ("1", &[320, 640, 1280, 1280][..], 768, &[(768, 12)][..], "[8,8,8,8]"),
        ("2", &[320, 640, 1280, 1280], 1024, &[(1024, 23)], "[5,10,20,20]"),
        ("xl", &[320, 640, 1280], 2048, &[(768, 12), (1280, 32)], "[5,10,20]"),
    ] {
        let table = table(family);
        let unet = unet_json(family, channels, context);
        let texts = text_jsons(family, texts);
        let here = shapes_here(&unet, &vae_json([128, 256, 512, 512]), &texts);
        let mut shapes = shapes_there(&table, &here);
        let idle: &[(&str, &[usize])] = match family {
            "1" => &[("cond_stage_model.transformer.text_model.embeddings.position_ids", &[1, 77])],
            // The layer that is not used, and the projection.
            "2" => &[
                ("cond_stage_model.model.transformer.resblocks.23.ln_1.weight", &[1024]),
                ("cond_stage_model.model.text_projection", &[1024, 1024]),
            ],
            _ => &[("conditioner.embedders.1.model.logit_scale", &[])],
        };
        shapes.extend(idle.iter().map(|(name, shape)| ((*name).to_owned(), shape.to_vec())));
        shapes.insert("model_ema.decay".into(), vec![]);
        let path = Path::new("sd.safetensors");
        let told = Family::tell(path, &shapes).unwrap();
        assert!(matches!(
            (family, &told),
            ("1", Family::One(_)) | ("2", Family::Two(_)) | ("xl", Family::Xl(_))
        ));
        for (name, _) in idle {
            assert!(told.encoders().iter().any(|encoder| encoder.is_idle(name)), "{name}");
        }
        let read = unet::config(path, &shapes, 64).unwrap();
        let network = NetworkConfig::from_json(&read, "unet").unwrap();
        assert_eq!(network.weight_shapes(), here[0], "{read}");
        let expected = NetworkConfig::from_json(&unet, "unet").unwrap();
        assert_eq!(network.to_json()["attention_head_dim"].to_string(), heads);
        assert_eq!(expected.geometry(), network.geometry());
        let vae = vae::config(path, &shapes, told.latent_scale()).unwrap();
        assert_eq!(AutoencoderConfig::from_json(&vae, "vae").unwrap().weight_shapes(), here[1]);
        type Find = Box<dyn Fn(&str) -> Source>;
        let mut sources: Vec<Find> =
            vec![Box::new(unet::sources(&network.weight_shapes())), Box::new(vae::sources(&vae))];
        for (encoder, here) in told.encoders().iter().zip(&here[2..]) {
            let text = encoder.config(path, &shapes).unwrap();
            let read = ClipConfig::from_json(encoder.class(), &text, "text").unwrap();
            assert_eq!(as_in_files(read.weight_shapes()), *here, "{text}");
            sources.push(Box::new(encoder.sources()));
        }
        for (rows, source) in table.rows().into_iter().zip(sources) {
            for [name, there, how] in rows {
                let expected = match how.as_str() {
                    "same" => Source::Same(there.clone()),
                    "point" => Source::Point(there.clone()),
                    "transposed" => Source::Transposed(there.clone()),
                    third => Source::Third(there.clone(), third["third ".len()..].parse().unwrap()),
                };
                assert_eq!(source(name), expected, "{name}");
            }
        }
    }
}

/// A small checkpoint of a family with random weights.
fn small(family: &str) -> HashMap<String, Tensor> {
    let (levels, context, texts) = match family {
        "xl" => (3, 128, &[(64, 2), (64, 2)][..]),
        _ => (4, 64, &[(64, 2)][..]),
    };
    let here = shapes_here(
        &unet_json(family, &[64; 4][..levels], context),
        &vae_json([32; 4]),
        &text_jsons(family, texts),
    );
    let shapes = shapes_there(&table(family), &here);
    shapes
        .into_iter()
        .enumerate()
        .map(|(i, (name, shape))| {
            let mut values = vec![0.0; shape.iter().product()];
            crate::noise::normal(7, i as u64, &mut values);
            (name, Tensor::from_vec(values, shape, &Device::Cpu).unwrap())
        })
        .collect()
}

fn written(tensors: &HashMap<String, Tensor>) -> (tempfile::TempDir, std::path::PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    candle_core::safetensors::save(tensors, &path).unwrap();
    (folder, path)
}

#[test]
fn a_whole_checkpoint_becomes_a_folder_with_the_same_tensors() {
    for (family, prediction) in [("1", None), ("2", Some(PredictionType::Velocity)), ("xl", None)] {
        let mut tensors = small(family);
        let extra = Tensor::zeros(4, DType::F32, &Device::Cpu).unwrap();
        tensors.insert("betas".into(), extra.clone());
        tensors.insert("first_stage_model.loss.logvar".into(), extra.clone());
        let root = if family == "xl" { clip::BOTH[1] } else { clip::ALONE };
        tensors.insert(format!("{root}logit_scale"), extra);
        let (folder, path) = written(&tensors);
        let out = folder.path().join("out");
        import(&path, &out, prediction).unwrap();

        let opened = ModelFolder::open_for_images(&out).unwrap();
        assert_eq!(
            opened.schedule.prediction_type(),
            prediction.unwrap_or(PredictionType::Epsilon)
        );
        let tokenizer = ClipTokenizer::open(&out.join("tokenizer")).unwrap();
        assert_eq!(tokenizer.vocabulary(), 49_408);
        let table = table(family);
        for (component, rows) in FOLDERS.into_iter().zip(table.rows()) {
            if rows.is_empty() {
                continue;
            }
            let stem =
                if component.starts_with("text") { "model" } else { "diffusion_pytorch_model" };
            let file = out.join(component).join(format!("{stem}.safetensors"));
            let read = candle_core::safetensors::load(file, &Device::Cpu).unwrap();
            let mut compared = 0;
            for [name, source, how] in rows {
                let Some(tensor) = read.get(name) else { continue };
                let there = &tensors[source];
                let there = match how.as_str() {
                    "same" => there.clone(),
                    "point" => there.reshape(tensor.shape()).unwrap(),
                    "transposed" => there.t().unwrap(),
                    third => there.chunk(3, 0).unwrap()
                        [third["third ".len()..].parse::<usize>().unwrap()]
                    .clone(),
                };
                let difference = (tensor - there).unwrap().abs().unwrap().sum_all().unwrap();
                assert_eq!(difference.to_scalar::<f32>().unwrap(), 0.0, "{name}");
                compared += 1;
            }
            assert_eq!(compared, read.len(), "{component}");
        }
        let pipeline = ModelFolder::open(&out).unwrap().load(DType::F32, &Device::Cpu).unwrap();
        assert!(pipeline.decoder.is_some() && pipeline.reader.is_some());
    }
}

#[test]
fn what_is_something_else_is_refused_by_its_name() {
    let whole = small("1");
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
    let lora = "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight";
    type Change = Box<dyn Fn(&mut HashMap<String, Tensor>)>;
    let with = |name: &'static str, shape: &'static [usize]| -> Change {
        Box::new(move |tensors| drop(tensors.insert(name.into(), zeros(shape))))
    };
    let without = |prefix: &'static str| -> Change {
        Box::new(move |tensors| tensors.retain(|name, _| !name.starts_with(prefix)))
    };
    let cases: [(Change, &[&str]); 11] = [
        (
            with("conditioner.embedders.0.model.ln_final.weight", &[4]),
            &["Stable Diffusion XL", "refiner"],
        ),
        (with("control_model.time_embed.0.weight", &[4, 4]), &["ControlNet"]),
        (with("double_blocks.0.img_attn.norm.key_norm.scale", &[4]), &["Flux"]),
        (with(lora, &[4, 4]), &["LoRA"]),
        (with(unet::FIRST, &[64, 9, 3, 3]), &["inpainting", "9 channels"]),
        (with(unet::FIRST, &[64, 8, 3, 3]), &["InstructPix2Pix", "8 channels"]),
        (with("model.diffusion_model.label_emb.0.0.weight", &[4, 4]), &["label_emb", "unCLIP"]),
        (with("model.diffusion_model.out.3.weight", &[4]), &["out.3.weight"]),
        (without("cond_stage_model."), &["no text encoder"]),
        (without("first_stage_model.decoder.up.0."), &["decoder.up.0.block.0"]),
        (without("model.diffusion_model."), &["is not Stable Diffusion"]),
    ];
    for (change, parts) in cases {
        let mut tensors = whole.clone();
        change(&mut tensors);
        let (folder, path) = written(&tensors);
        let out = folder.path().join("out");
        let problem = import(&path, &out, None).unwrap_err().to_string();
        assert!(parts.iter().all(|part| problem.contains(part)), "{problem}");
        assert!(!out.exists());
    }
    let (folder, path) = written(&small("2"));
    let problem = import(&path, &folder.path().join("out"), None).unwrap_err().to_string();
    assert!(problem.contains("v_prediction") && problem.contains("epsilon"), "{problem}");
}
