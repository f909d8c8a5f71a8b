//! Whole pipelines against diffusers' own (`golden/make_pipelines.py`): what a folder holds, what comes of the same noise,
//! the forms that weights come in, and folders that do not fit together.
#![allow(clippy::unwrap_used)]

#[path = "common/from_noise.rs"]
mod from_noise;

use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use from_noise::FromNoise;
use serde_json::{Value, json};
use tempfile::TempDir;
use understudy_models::Conditions;
use understudy_models::checkpoint::{ModelFolder, Pipeline};
use understudy_models::text::PromptStates;

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/pipeline")
}

/// A pipeline, and what diffusers makes with it.
struct Golden {
    pipeline: Pipeline,
    theirs: FromNoise,
}

impl Golden {
    fn read(name: &str) -> Self {
        let folder = if name.ends_with("_xl") { "stable_diffusion_xl" } else { name };
        let folder = ModelFolder::open_for_images(&golden().join(folder)).unwrap();
        let (theirs, _) = FromNoise::read(&golden().join(format!("{name}.safetensors")));
        Self { pipeline: folder.load(DType::F32, &Device::Cpu).unwrap(), theirs }
    }

    /// What the network answers about `x` at a time, guided as the request says.
    fn answer(&self, x: &Tensor, time: f64) -> Tensor {
        let network = &self.pipeline.network;
        let rows = x.dim(0).unwrap();
        let times = |rows| Tensor::full(time as f32, rows, &Device::Cpu).unwrap();
        if self.theirs.request["guidance_scale"].is_null() {
            return network.forward(x, &times(rows), None).unwrap();
        }
        let both = Tensor::cat(&[x, x], 0).unwrap();
        let place = Tensor::new(&[0u32, 0, 1, 1], &Device::Cpu).unwrap();
        let pick = |tensor: Tensor| tensor.index_select(&place, 0).unwrap();
        let told = self.pipeline.reader.as_ref().map(|reader| {
            let texts = ["prompt", "negative_prompt"].map(|it| self.theirs.request[it].as_str());
            let ids = texts.map(|text| {
                reader.tokenizer.encode(text.unwrap_or_default(), reader.encoder.tokens()).unwrap()
            });
            let ids = ids.each_ref().map(|ids| &ids[..]);
            let [wanted, unwanted]: [PromptStates; 2] =
                reader.encoder.read(&ids).unwrap().try_into().ok().unwrap();
            let states = Tensor::stack(&[&wanted.states, &unwanted.states], 0).unwrap();
            let pooled = (!wanted.pooled.is_empty())
                .then(|| Tensor::new(vec![wanted.pooled, unwanted.pooled], &Device::Cpu).unwrap());
            // Nothing to be guided away from is zeros, where the pipeline has it so.
            let silent = reader.zero_empty_prompt && texts[1].is_none();
            let said = Tensor::new(&[1f32, if silent { 0.0 } else { 1.0 }], &Device::Cpu).unwrap();
            let states = states.broadcast_mul(&said.reshape((2, 1, 1)).unwrap()).unwrap();
            let pooled = pooled.map(|pooled| {
                let pooled = pooled.broadcast_mul(&said.reshape((2, 1)).unwrap()).unwrap();
                let [_, height, width] = decoder_image(&self.pipeline);
                let sizes = [height, width, 0.0, 0.0, height, width];
                let sizes = Tensor::new(&[sizes, sizes], &Device::Cpu).unwrap();
                pick(Tensor::cat(&[pooled, sizes], 1).unwrap())
            });
            (pick(states), pooled)
        });
        let (prompt, pooled) = told.unzip();
        let class = self.theirs.request["class_label"].as_u64().map(|class| {
            let classes = [class as u32, class as u32, 10, 10];
            Tensor::new(&classes, &Device::Cpu).unwrap()
        });
        let class = class.or(pooled.flatten());
        let conditions = Conditions {
            condition: class.as_ref(),
            prompt: prompt.as_ref(),
            ..Conditions::default()
        };
        let answers = network.evaluate(&both, &times(2 * rows), conditions).unwrap();
        self.theirs.guided(&answers)
    }
}

/// Channels, height and width of a pipeline's images.
fn decoder_image(pipeline: &Pipeline) -> [f32; 3] {
    pipeline.decoder.as_ref().unwrap().image_shape().map(|side| side as f32)
}

#[test]
fn pipelines_make_what_diffusers_makes_of_the_same_noise() {
    for name in
        ["stable_diffusion", "latent_diffusion", "dit", "stable_diffusion_xl", "unsaid_negative_xl"]
    {
        let golden = Golden::read(name);
        let Pipeline { network, schedule, decoder, .. } = &golden.pipeline;
        let parts = (&**network, schedule, decoder.as_ref().unwrap());
        golden.theirs.check(name, parts, |x, time| golden.answer(x, time));
    }
}

#[test]
fn what_is_not_run_is_no_obstacle() {
    let folder = ModelFolder::open(&golden().join("stable_diffusion")).unwrap();
    assert_eq!(folder.image_shape(), [3, 16, 16]);
    assert!(folder.reads_text() && folder.autoencoder.is_some());
}

#[test]
fn all_forms_of_weights_are_the_same_tensors() {
    let read = |form: &str| {
        let folder = ModelFolder::open(&golden().join("forms").join(form)).unwrap();
        let tensors = folder.tensors().unwrap_or_else(|error| panic!("{form}: {error}"));
        let mut all: Vec<_> = tensors.into_iter().collect();
        all.sort_by(|a, b| a.0.cmp(&b.0));
        let numbers = |(name, tensor): (String, Tensor)| {
            let values = tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap();
            (name, tensor.dims().to_vec(), values.to_vec1::<f32>().unwrap())
        };
        all.into_iter().map(numbers).collect::<Vec<_>>()
    };
    let whole = read("whole");
    assert!(whole.len() > 20);
    for form in ["variant", "sharded", "bin", "bin_sharded"] {
        assert!(read(form) == whole, "{form}");
    }
}

/// A copy of a folder that may be broken.
struct Copy(TempDir);

impl Copy {
    fn of(name: &str) -> Self {
        let copy = Self(tempfile::tempdir().unwrap());
        copy_all(&golden().join(name), copy.0.path());
        copy
    }

    fn path(&self, file: &str) -> PathBuf {
        self.0.path().join(file)
    }

    fn edit(&self, file: &str, edit: impl FnOnce(&mut Value)) -> &Self {
        let path = self.path(file);
        let mut value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
        edit(&mut value);
        fs::write(path, value.to_string()).unwrap();
        self
    }

    /// The problem with it, at its opening or its loading.
    fn problem(&self) -> String {
        let folder = ModelFolder::open_for_images(self.0.path());
        match folder.and_then(|folder| folder.load(DType::F32, &Device::Cpu)) {
            Ok(_) => panic!("it loads"),
            Err(error) => error.to_string(),
        }
    }
}

fn copy_all(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let (path, name) = entry.map(|entry| (entry.path(), entry.file_name())).unwrap();
        match path.is_dir() {
            true => copy_all(&path, &to.join(name)),
            false => drop(fs::copy(&path, to.join(name)).unwrap()),
        }
    }
}

#[test]
fn parts_that_are_missing_or_do_not_fit_are_named_with_the_remedy() {
    let sd = || Copy::of("stable_diffusion");
    let holds = |copy: &Copy, parts: &[&str]| {
        let problem = copy.problem();
        assert!(
            parts.iter().all(|part| problem.contains(part)),
            "{problem} misses one of {parts:?}"
        );
    };
    let copy = sd();
    fs::remove_file(copy.path("tokenizer/tokenizer.json")).unwrap();
    holds(&copy, &["tokenizer", "vocab.json and merges.txt", "fetch"]);
    let copy = sd();
    copy.edit("model_index.json", |index| index["tokenizer"] = json!([null, null]));
    holds(&copy, &["model_index.json", "`text_encoder` needs a `tokenizer`"]);
    let copy = sd();
    fs::remove_dir_all(copy.path("vae")).unwrap();
    holds(&copy, &["vae/config.json", "model_index.json names `vae`", "fetch"]);
    let copy = sd();
    copy.edit("model_index.json", |index| index["text_encoder"] = json!([null, null]));
    holds(&copy, &["unet/config.json: cross_attention_dim", "text encoder"]);
    let copy = sd();
    copy.edit("unet/config.json", |config| config["cross_attention_dim"] = json!(24));
    holds(&copy, &["unet/config.json: cross_attention_dim", "24", "must be 16"]);
    let copy = sd();
    copy.edit("unet/config.json", |config| config["in_channels"] = json!(9));
    holds(&copy, &["unet/config.json: in_channels", "9", "inpainting"]);
    let copy = sd();
    copy.edit("text_encoder/config.json", |config| {
        config["vocab_size"] = json!(100);
        config["eos_token_id"] = json!(99);
    });
    holds(&copy, &["tokenizer", "knows 100", "vocab_size"]);
    let copy = sd();
    copy.edit("model_index.json", |index| {
        index["text_encoder_2"] = json!(["transformers", "CLIPTextModelWithProjection"]);
    });
    holds(&copy, &["`text_encoder_2` needs a `tokenizer_2`"]);
    let xl = || Copy::of("stable_diffusion_xl");
    let copy = xl();
    copy.edit("model_index.json", |index| index["text_encoder"] = json!([null, null]));
    holds(&copy, &["`text_encoder_2` is there without a `text_encoder`", "refiner", "base model"]);
    let copy = xl();
    copy.edit("model_index.json", |index| index["text_encoder_2"] = json!([null, null]));
    holds(&copy, &["cross_attention_dim", "40", "must be 16"]);
    let copy = xl();
    copy.edit("unet/config.json", |config| {
        config["projection_class_embeddings_input_dim"] = json!(61);
    });
    holds(&copy, &["addition_embed_type", "a pooled text of 13 numbers", "pooled text of 12"]);
    let copy = xl();
    copy.edit("tokenizer_2/tokenizer.json", |tokenizer| {
        let vocabulary = &mut tokenizer["model"]["vocab"];
        let [one, two] = ["a", "b"].map(|token| vocabulary[token].clone());
        (vocabulary["a"], vocabulary["b"]) = (two, one);
    });
    holds(&copy, &["tokenizer_2", "numbers words otherwise"]);
    let copy = xl();
    fs::remove_file(copy.path("text_encoder_2/model.safetensors")).unwrap();
    holds(&copy, &["text_encoder_2/model.safetensors"]);
    let copy = sd();
    fs::remove_file(copy.path("vae/diffusion_pytorch_model.safetensors")).unwrap();
    holds(&copy, &["vae/diffusion_pytorch_model.safetensors"]);
    let copy = sd();
    let weights = copy.path("text_encoder/model.safetensors");
    let bytes = fs::read(&weights).unwrap();
    fs::write(&weights, &bytes[..bytes.len() / 2]).unwrap();
    holds(&copy, &["text_encoder/model.safetensors", "fetch"]);

    let copy = Copy::of("forms/variant");
    let half = copy.path("unet/diffusion_pytorch_model.fp16.safetensors");
    fs::copy(&half, copy.path("unet/diffusion_pytorch_model.non_ema.safetensors")).unwrap();
    holds(&copy, &["unet", "fp16", "non_ema", "leave one"]);
    let copy = Copy::of("forms/sharded");
    let shard = copy.path("unet/diffusion_pytorch_model-00002-of-00005.safetensors");
    fs::write(&shard, &fs::read(&shard).unwrap()[..100]).unwrap();
    holds(&copy, &["00002-of-00005.safetensors", "fetch"]);

    let copy = Copy::of("dit");
    copy.edit("transformer/config.json", |config| config["norm_type"] = json!("layer_norm"));
    holds(&copy, &["transformer/config.json", "Transformer2DModel"]);
}

#[test]
fn a_merge_that_is_not_in_the_vocabulary_is_refused() {
    let copy = Copy::of("stable_diffusion");
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tokenizer");
    fs::remove_file(copy.path("tokenizer/tokenizer.json")).unwrap();
    for file in ["vocab.json", "merges.txt"] {
        fs::copy(from.join(file), copy.path("tokenizer").join(file)).unwrap();
    }
    ModelFolder::open(copy.0.path()).unwrap().load(DType::F32, &Device::Cpu).unwrap();
    let merges = copy.path("tokenizer/merges.txt");
    fs::write(&merges, fs::read_to_string(&merges).unwrap() + "zq qz\n").unwrap();
    let problem = copy.problem();
    assert!(problem.contains("merges.txt"), "{problem}");
}
