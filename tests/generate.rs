//! Distillation and evaluation sample as the server does: the same seed is the same image.

#![allow(clippy::unwrap_used)]

#[path = "common/folder.rs"]
mod folder;
#[path = "common/stable_diffusion_3.rs"]
mod stable_diffusion_3;

use std::{num::NonZeroUsize, path::Path, sync::Arc, time::Duration};

use candle_core::{DType, Device, Tensor};
use folder::copy;
use understudy::{
    engine::{Beginning, Engine, Event, GenerateRequest, Mask, SampleSpec, Start},
    metrics::Metrics,
    registry::{Model, Origin, Syntax},
};
use understudy_distill::generate::{Classes, Sampling};
use understudy_models::{Image, checkpoint::ModelFolder, sampler};

#[test]
fn batches_hold_the_images_the_server_makes() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/zoo/fashion-mnist-teacher");
    let loaded = ModelFolder::open(&folder).unwrap().load(DType::F32, &Device::Cpu).unwrap();
    // Ancestral, so that every step's noise counts.
    let kind = sampler::Kind::Ddpm;
    let trajectory = sampler::trajectory(&loaded.schedule, kind, 3, 0.0, false).unwrap();
    let sampling = Sampling {
        trajectory: Arc::clone(&trajectory),
        classes: Classes::FromSeed(10),
        captions: None,
        first_seed: 7,
        batch: 2,
    };
    let batches = sampling.batches(loaded.network.as_ref(), 0..3);
    let batches: Vec<_> = batches.collect::<candle_core::Result<_>>().unwrap();
    let ours: Vec<Image> = batches.iter().flat_map(|batch| batch.images(None).unwrap()).collect();
    let labels: Vec<u32> = batches.iter().flat_map(|batch| batch.labels.clone().unwrap()).collect();
    assert_eq!(batches[1].seeds, [9]);

    let model =
        Model::load(Origin::new(&folder, DType::F32, &[Device::Cpu]), "teacher".into(), 0).unwrap();
    let engine = Engine::start(NonZeroUsize::MIN, 3, Metrics::new().unwrap()).unwrap();
    let samples = labels.iter().zip(7..);
    let request = GenerateRequest {
        model: Arc::new(model),
        samples: samples
            .map(|(&label, seed)| SampleSpec { seed, class_label: Some(label) })
            .collect(),
        trajectory,
        prompts: Vec::new(),
        start: Start::Noise,
        guidance_scale: 1.0,
        partial_images: 0,
        deadline: None,
    };
    let mut served = vec![None; 3];
    let mut submission = engine.generate(request).unwrap();
    while let Some(event) = submission.blocking_next() {
        if let Event::Completed { index, image, .. } = event {
            served[index] = Some(image);
        }
    }
    assert_eq!(served.into_iter().map(Option::unwrap).collect::<Vec<_>>(), ours);
}

/// diffusers' own small Stable Diffusion (`models/tests/golden/make_pipelines.py`) through the engine: prompt, guidance,
/// steps and decoder, from the same noise.
#[tokio::test(flavor = "multi_thread")]
async fn the_engine_draws_what_diffusers_draws_after_a_prompt() {
    check_drawn("stable_diffusion", "red apple, noto style", 1, Syntax::Plain).await;
}

/// Of three parts, which compel read.
#[tokio::test(flavor = "multi_thread")]
async fn the_engine_draws_what_diffusers_draws_after_a_long_prompt() {
    let prompt = "red apple and green apple on a table, noto style ".repeat(2);
    check_drawn("long_prompt", &prompt, 3, Syntax::Plain).await;
}

/// Whose words count more or less, as diffusers' community pipeline for long weighted prompts reads them.
#[tokio::test(flavor = "multi_thread")]
async fn the_engine_draws_what_diffusers_draws_after_a_weighted_prompt() {
    let prompt = "a (red:1.6) apple, ((noto)) [style]";
    check_drawn("weighted_prompt", prompt, 1, Syntax::Weighted).await;
    let prompt = "a (red:1.6) apple and (green apple:0.4) on a table, noto [style] ".repeat(2);
    check_drawn("long_weighted_prompt", &prompt, 3, Syntax::Weighted).await;
}

/// Stable Diffusion XL's way (`models/tests/golden/make_xl_pipeline.py`): two encoders, a pooled text, sizes; with something to be guided
/// away from, with nothing, and at another size.
#[tokio::test(flavor = "multi_thread")]
async fn the_engine_draws_what_diffusers_draws_with_two_text_encoders() {
    for (name, negative, size) in [
        ("stable_diffusion_xl", "a cat", None),
        ("unsaid_negative_xl", "", None),
        ("another_size_xl", "", Some([16, 24])),
    ] {
        let prompt = "red apple, noto style";
        let euler = (sampler::Kind::Euler, size);
        check(("stable_diffusion_xl", name), [prompt, negative], 1, Syntax::Plain, euler).await;
    }
}

async fn check_drawn(name: &str, prompt: &str, parts: usize, syntax: Syntax) {
    let ddim = (sampler::Kind::Ddim, None);
    check(("stable_diffusion", name), [prompt, "a cat"], parts, syntax, ddim).await;
}

async fn check(
    (folder, name): (&str, &str),
    [prompt, negative]: [&str; 2],
    parts: usize,
    syntax: Syntax,
    (kind, size): (sampler::Kind, Option<[usize; 2]>),
) {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tests/golden/pipeline");
    let device = Device::Cpu;
    let model =
        Model::load(Origin::new(&golden.join(folder), DType::F32, &[device]), "sd".into(), 0);
    let model = Arc::new(model.unwrap());
    let tensors = golden.join(format!("{name}.safetensors"));
    let tensors = candle_core::safetensors::load(tensors, &Device::Cpu).unwrap();
    let prompts = model.prompts(prompt, negative, 4.0, syntax).unwrap();
    let form = model.form_for(size, &prompts);
    assert_eq!((form.parts, form.size), (parts, size.unwrap_or([16, 16])));
    let model = model.in_form(form).await.unwrap();
    let latents = &tensors["latents"];
    let rows = latents.dim(0).unwrap();
    let request = GenerateRequest {
        samples: vec![SampleSpec { seed: 0, class_label: None }; rows],
        trajectory: sampler::trajectory(&model.schedule, kind, 6, 0.0, false).unwrap(),
        prompts,
        start: Start::Latents((0..rows).map(|row| latents.narrow(0, row, 1).unwrap()).collect()),
        guidance_scale: 4.0,
        partial_images: 0,
        deadline: None,
        model: Arc::clone(&model),
    };
    let psnr = psnr(&drawn(request).await, &tensors["images"]);
    assert!(psnr >= 60.0, "{psnr:.1} dB");
}

/// The pixels of a request's images, one behind the other.
async fn drawn(request: GenerateRequest) -> Vec<u8> {
    let engine = Engine::start(NonZeroUsize::MIN, 2, Metrics::new().unwrap()).unwrap();
    let mut drawn = vec![Vec::new(); request.samples.len()];
    let mut submission = engine.generate(request).unwrap();
    while let Some(event) = submission.next().await {
        match event {
            Event::Completed { index, image, .. } => drawn[index] = image.pixels,
            Event::Failed { failure, .. } => panic!("{failure:?}"),
            _ => {}
        }
    }
    drawn.concat()
}

/// PixArt's pipelines (`models/tests/golden/make_pixart_pipelines.py`), whose prompts T5 reads, as they are and after its
/// weights were forgotten.
#[tokio::test(flavor = "multi_thread")]
async fn the_engine_draws_what_diffusers_draws_after_a_prompt_that_t5_read() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tests/golden");
    for (name, size) in [("alpha", [16, 24]), ("sigma", [16, 16])] {
        let folder = tempfile::tempdir().unwrap();
        copy(&golden.join("pixart_pipeline").join(name), folder.path());
        copy(&golden.join("t5_tokenizer"), &folder.path().join("tokenizer"));
        let path = golden.join("pixart_pipeline").join(name).with_extension("safetensors");
        let (request, images) = asked_of(folder.path(), &path, size).await;
        let (model, prompts) = (Arc::clone(&request.model), request.prompts.clone());
        // Nobody has asked yet.
        assert!(!model.unload_idle_encoders(Duration::ZERO));
        model.take_prompts(&prompts).await.unwrap();
        assert!(!model.unload_idle_encoders(Duration::from_hours(1)));
        assert!(model.unload_idle_encoders(Duration::ZERO));
        let psnr = psnr(&drawn(request).await, &images);
        assert!(psnr >= 60.0, "{name}: {psnr:.1} dB");
        // What a prompt came to is kept, so nobody need read it again.
        assert!(model.unload_idle_encoders(Duration::ZERO));
        model.take_prompts(&prompts).await.unwrap();
        assert!(!model.unload_idle_encoders(Duration::ZERO));
    }
}

/// Stable Diffusion 3's pipelines (`models/tests/golden/make_sd3_pipelines.py`): prompts that CLIP and T5 read, or CLIP alone.
#[tokio::test(flavor = "multi_thread")]
async fn the_engine_draws_what_diffusers_draws_with_three_text_encoders() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tests/golden");
    for (name, size) in [("three", [16, 16]), ("two", [16, 24])] {
        let folder = tempfile::tempdir().unwrap();
        stable_diffusion_3::put(name, folder.path());
        let path = golden.join("sd3_pipeline").join(name).with_extension("safetensors");
        let (request, images) = asked_of(folder.path(), &path, size).await;
        let model = Arc::clone(&request.model);
        let psnr = psnr(&drawn(request).await, &images);
        assert!(psnr >= 60.0, "{name}: {psnr:.1} dB");
        // Only T5's weights are read when they are needed, and forgotten.
        assert_eq!(model.unload_idle_encoders(Duration::ZERO), name == "three");
    }
}

/// A folder's pipeline asked for the two images of a golden file, of that height and width, from its latents; and the images.
async fn asked_of(folder: &Path, golden: &Path, size: [usize; 2]) -> (GenerateRequest, Tensor) {
    let request = request_of(golden);
    let mut tensors = candle_core::safetensors::load(golden, &Device::Cpu).unwrap();
    let origin = Origin::new(folder, DType::F32, &[Device::Cpu]);
    let model = Arc::new(Model::load(origin, "model".into(), 0).unwrap());
    let text = |field: &str| request[field].as_str().unwrap();
    let scale = request["guidance_scale"].as_f64().unwrap();
    let prompts = [text("prompt"), text("negative_prompt")];
    let prompts = model.prompts(prompts[0], prompts[1], scale, Syntax::Plain).unwrap();
    let model = model.in_form(model.form_for(Some(size), &prompts)).await.unwrap();
    let steps = request["steps"].as_u64().unwrap() as usize;
    let kind = text("scheduler").parse().unwrap();
    let learned = model.geometry.learned_variance();
    let latents = (0..2).map(|row| tensors["latents"].narrow(0, row, 1).unwrap()).collect();
    let request = GenerateRequest {
        samples: vec![SampleSpec { seed: 0, class_label: None }; 2],
        trajectory: sampler::trajectory(&model.schedule, kind, steps, 0.0, learned).unwrap(),
        prompts,
        start: Start::Latents(latents),
        guidance_scale: scale,
        partial_images: 0,
        deadline: None,
        model,
    };
    (request, tensors.remove("images").unwrap())
}

/// What a golden file's images were asked for with.
fn request_of(path: &Path) -> serde_json::Value {
    let bytes = std::fs::read(path).unwrap();
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    serde_json::from_str(&header.metadata().as_ref().unwrap()["request"]).unwrap()
}

/// Images that begin with another (`models/tests/golden/make_edits.py`): the encoder, its variation, the noise of a seed, the steps
/// that are left, and the decoder.
#[tokio::test(flavor = "multi_thread")]
async fn the_engine_draws_what_diffusers_draws_of_an_image() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tests/golden/pipeline");
    let origin = Origin::new(&golden.join("stable_diffusion"), DType::F32, &[Device::Cpu]);
    let model = Arc::new(Model::load(origin, "sd".into(), 0).unwrap());
    model.take_images().await.unwrap();
    let tensors = golden.join("edits.safetensors");
    let tensors = candle_core::safetensors::load(tensors, &Device::Cpu).unwrap();
    let picture = tensors["picture"].to_dtype(DType::F32).unwrap();
    let picture = picture.permute((2, 0, 1)).unwrap().affine(1.0 / 127.5, -1.0).unwrap();
    let picture = picture.unsqueeze(0).unwrap().contiguous().unwrap();
    for (name, kind) in [
        ("ddim", sampler::Kind::Ddim),
        ("dpm++", sampler::Kind::DpmSolverPlusPlus),
        ("euler", sampler::Kind::Euler),
        ("heun", sampler::Kind::Heun),
        ("masked.ddim", sampler::Kind::Ddim),
        ("masked.dpm++", sampler::Kind::DpmSolverPlusPlus),
        ("masked.heun", sampler::Kind::Heun),
    ] {
        let course = sampler::from_image(&model.schedule, kind, 9, 0.6, 0.0, false).unwrap();
        let mask = (name.starts_with("masked")).then(|| {
            let drawn = tensors["mask"].unsqueeze(0).unwrap().unsqueeze(0).unwrap();
            Arc::new(Mask { drawn, after: course.after })
        });
        let request = GenerateRequest {
            samples: [5, 6].map(|seed| SampleSpec { seed, class_label: None }).into(),
            trajectory: course.trajectory,
            prompts: model.prompts("red apple, noto style", "a cat", 4.0, Syntax::Plain).unwrap(),
            start: Start::Image(Beginning { image: picture.clone(), begin: course.begin, mask }),
            guidance_scale: 4.0,
            partial_images: 0,
            deadline: None,
            model: Arc::clone(&model),
        };
        let psnr = psnr(&drawn(request).await, &tensors[&format!("{name}.images")]);
        assert!(psnr >= 60.0, "{name}: {psnr:.1} dB");
    }
}

/// Of 8-bit pictures and those of a tensor in [−1, 1].
fn psnr(drawn: &[u8], expected: &Tensor) -> f64 {
    let expected: Vec<u8> =
        Image::from_batch(expected).unwrap().into_iter().flat_map(|it| it.pixels).collect();
    assert_eq!(drawn.len(), expected.len());
    let squares = drawn.iter().zip(&expected).map(|(a, b)| f64::from(a.abs_diff(*b)).powi(2));
    let mean = squares.sum::<f64>() / drawn.len() as f64;
    10.0 * (255.0 * 255.0 / mean).log10()
}
