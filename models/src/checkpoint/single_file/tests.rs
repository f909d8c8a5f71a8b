//! Against what diffusers' own scripts say of every tensor (`models/tests/golden/make_single_files.py`), and the whole way with
//! small networks.

use super::*;
use crate::checkpoint::ModelFolder;
use candle_core::Device;
use serde::Deserialize;

#[derive(Deserialize)]
struct Table {
    unet: Vec<[String; 3]>,
    vae: Vec<[String; 3]>,
    text_encoder: Vec<[String; 3]>,
}

fn table(family: &str) -> Table {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    crate::checkpoint::read::json(&golden.join(format!("single_file_{family}.json"))).unwrap()
}

fn unet_json(family: &str, channels: [usize; 4], context: usize) -> Value {
    let linear = family == "2";
    let heads = channels.map(|channels| if linear { (channels / 64).max(1) } else { 8 });
    json!({
        "_class_name": "UNet2DConditionModel",
        "sample_size": 64,
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
        "block_out_channels": channels,
        "cross_attention_dim": context,
        "attention_head_dim": heads,
        "use_linear_projection": linear,
    })
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

fn text_json(family: &str, width: usize, layers: usize) -> Value {
    json!({
        "vocab_size": 49_408,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": (width / 64).max(1),
        "hidden_act": if family == "2" { "gelu" } else { "quick_gelu" },
    })
}

/// Names here with their shapes, of each component.
fn shapes_here(unet: &Value, vae: &Value, text: &Value) -> [BTreeMap<String, Vec<usize>>; 3] {
    [
        NetworkConfig::from_json(unet, "unet").unwrap().weight_shapes(),
        AutoencoderConfig::from_json(vae, "vae").unwrap().weight_shapes(),
        as_in_files(
            TextEncoderConfig::from_json(clip::CLASS, text, "text").unwrap().weight_shapes(),
        ),
    ]
}

fn as_in_files(shapes: Shapes) -> Shapes {
    shapes.into_iter().map(|(name, shape)| (file_name(&name), shape)).collect()
}

/// The file's tensors for those here, by the golden tables, and what each is made of.
fn shapes_there(table: &Table, here: &[BTreeMap<String, Vec<usize>>; 3]) -> Shapes {
    let mut there = Shapes::new();
    for (rows, here) in [&table.unet, &table.vae, &table.text_encoder].into_iter().zip(here) {
        for [name, source, how] in rows {
            let Some(mut shape) = here.get(name).cloned() else { continue };
            match how.as_str() {
                "same" => {}
                "point" => shape.extend([1, 1]),
                _ => shape[0] *= 3,
            }
            there.insert(source.clone(), shape);
        }
    }
    there
}

#[test]
fn every_tensor_of_the_real_models_is_where_diffusers_finds_it() {
    for (family, context, width, layers) in [("1", 768, 768, 12), ("2", 1024, 1024, 23)] {
        let table = table(family);
        let unet = unet_json(family, [320, 640, 1280, 1280], context);
        let here =
            shapes_here(&unet, &vae_json([128, 256, 512, 512]), &text_json(family, width, layers));
        let mut shapes = shapes_there(&table, &here);
        if family == "2" {
            // The layer that is not used, and the projection.
            shapes.insert(
                "cond_stage_model.model.transformer.resblocks.23.ln_1.weight".into(),
                vec![1024],
            );
            shapes.insert("cond_stage_model.model.text_projection".into(), vec![1024, 1024]);
        }
        shapes.insert(
            "cond_stage_model.transformer.text_model.embeddings.position_ids".into(),
            vec![1, 77],
        );
        shapes.insert("model_ema.decay".into(), vec![]);
        let path = Path::new("sd.safetensors");
        let told = unet::config(path, &shapes, 64).unwrap();
        let network = NetworkConfig::from_json(&told, "unet").unwrap();
        assert_eq!(network.weight_shapes(), here[0], "{told}");
        let expected = NetworkConfig::from_json(&unet, "unet").unwrap();
        assert_eq!(
            network.to_json()["attention_head_dim"].to_string(),
            match family {
                "1" => "[8,8,8,8]".to_owned(),
                _ => "[5,10,20,20]".to_owned(),
            }
        );
        assert_eq!(expected.geometry(), network.geometry());
        let vae = vae::config(path, &shapes).unwrap();
        assert_eq!(AutoencoderConfig::from_json(&vae, "vae").unwrap().weight_shapes(), here[1]);
        let text = clip::config(path, &shapes).unwrap();
        let read = TextEncoderConfig::from_json(clip::CLASS, &text, "text").unwrap();
        assert_eq!(as_in_files(read.weight_shapes()), here[2], "{text}");
        type Find = Box<dyn Fn(&str) -> Source>;
        let sources: [Find; 3] = [
            Box::new(unet::sources(&network.weight_shapes())),
            Box::new(vae::sources(&vae)),
            Box::new(clip::sources(&shapes)),
        ];
        for (rows, source) in [table.unet, table.vae, table.text_encoder].into_iter().zip(sources) {
            for [name, there, how] in rows {
                let expected = match how.as_str() {
                    "same" => Source::Same(there),
                    "point" => Source::Point(there),
                    third => Source::Third(there, third["third ".len()..].parse().unwrap()),
                };
                assert_eq!(source(&name), expected, "{name}");
            }
        }
        assert_eq!(
            Family::tell(path, &shapes).unwrap(),
            if family == "1" { Family::One } else { Family::Two }
        );
    }
}

/// A small checkpoint of a family with random weights.
fn small(family: &str) -> HashMap<String, Tensor> {
    let channels = [64; 4];
    let here = shapes_here(
        &unet_json(family, channels, 64),
        &vae_json([32; 4]),
        &text_json(family, 64, 2),
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
    for (family, prediction) in [("1", None), ("2", Some(PredictionType::Velocity))] {
        let mut tensors = small(family);
        let extra = Tensor::zeros(4, DType::F32, &Device::Cpu).unwrap();
        tensors.insert("betas".into(), extra.clone());
        tensors.insert("first_stage_model.loss.logvar".into(), extra.clone());
        tensors.insert("cond_stage_model.logit_scale".into(), extra);
        let (folder, path) = written(&tensors);
        let out = folder.path().join("out");
        import(&path, &out, prediction).unwrap();

        let opened = ModelFolder::open_for_images(&out).unwrap();
        assert_eq!(
            opened.schedule.prediction_type(),
            prediction.unwrap_or(PredictionType::Epsilon)
        );
        assert_eq!(opened.tokenizer().unwrap().unwrap().vocabulary(), 49_408);
        let table = table(family);
        let components = [
            ("unet", "diffusion_pytorch_model", table.unet),
            ("vae", "diffusion_pytorch_model", table.vae),
            ("text_encoder", "model", table.text_encoder),
        ];
        for (component, stem, rows) in components {
            let file = out.join(component).join(format!("{stem}.safetensors"));
            let read = candle_core::safetensors::load(file, &Device::Cpu).unwrap();
            let mut compared = 0;
            for [name, source, how] in rows {
                let Some(tensor) = read.get(&name) else { continue };
                let there = &tensors[&source];
                let there = match how.as_str() {
                    "same" => there.clone(),
                    "point" => there.reshape(tensor.shape()).unwrap(),
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
        (with("conditioner.embedders.1.model.ln_final.weight", &[4]), &["Stable Diffusion XL"]),
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
