//! Distillation and evaluation sample as the server does: the same seed is the same image.

#![allow(clippy::unwrap_used)]

use std::{num::NonZeroUsize, path::Path, sync::Arc};

use candle_core::{DType, Device};
use understudy::{
    engine::{Engine, Event, GenerateRequest, SampleSpec},
    metrics::Metrics,
    registry::Model,
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
        first_seed: 7,
        batch: 2,
    };
    let batches = sampling.batches(loaded.network.as_ref(), 0..3);
    let batches: Vec<_> = batches.collect::<candle_core::Result<_>>().unwrap();
    let ours: Vec<Image> = batches.iter().flat_map(|batch| batch.images().unwrap()).collect();
    let labels: Vec<u32> = batches.iter().flat_map(|batch| batch.labels.clone().unwrap()).collect();
    assert_eq!(batches[1].seeds, [9]);

    let model = Model::load(&folder, "teacher".into(), 0, DType::F32, &[Device::Cpu]).unwrap();
    let engine = Engine::start(NonZeroUsize::MIN, 3, Metrics::new().unwrap()).unwrap();
    let samples = labels.iter().zip(7..);
    let request = GenerateRequest {
        model: Arc::new(model),
        samples: samples
            .map(|(&label, seed)| SampleSpec { seed, class_label: Some(label) })
            .collect(),
        trajectory,
        prompts: Vec::new(),
        latents: Vec::new(),
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
