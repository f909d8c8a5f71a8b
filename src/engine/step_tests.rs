//! What happens to a sample does not depend on who shares its evaluations.

use std::{path::Path, sync::Arc};

use tokio::sync::mpsc;
use understudy_models::sampler::{self, Kind};

use super::*;
use crate::{
    engine::{GenerateRequest, SampleSpec, Start},
    registry::Model,
};

fn evaluate(replica: &Replica, samples: &mut [Sample]) -> Result<Vec<Outcome>> {
    begin(replica, samples)?.end(samples)
}

fn sample(model: &Arc<Model>, kind: Kind, steps: usize, eta: f64, seed: u64, class: u32) -> Sample {
    let request = GenerateRequest {
        model: Arc::clone(model),
        samples: vec![SampleSpec { seed, class_label: Some(class) }],
        trajectory: sampler::trajectory(&model.schedule, kind, steps, eta, false).unwrap(),
        prompts: Vec::new(),
        start: Start::Noise,
        guidance_scale: 1.0,
        partial_images: 0,
        deadline: None,
    };
    let (reply, _) = mpsc::unbounded_channel();
    Sample::images(request, &[], false, &reply, || SampleKey(seed)).remove(0)
}

fn latent(sample: &Sample) -> Vec<u32> {
    let Task::Generate(walk) = &sample.task else { panic!("an image") };
    let latent = walk.latent.as_ref().unwrap();
    let x = latent.x.get(latent.row).unwrap();
    let values: Vec<f32> = x.flatten_all().unwrap().to_vec1().unwrap();
    values.into_iter().map(f32::to_bits).collect()
}

#[test]
fn the_f32_latent_is_bit_identical_alone_and_among_seven_others_at_other_timesteps() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/zoo/fashion-mnist-teacher");
    let model = Model::from_folder_for_test(&folder);
    let network = model.on(0);

    // One that adds noise, and one that remembers three answers.
    for (kind, eta) in [(Kind::Ddim, 1.0), (Kind::Pndm, 0.0)] {
        let mut alone = [sample(&model, kind, 8, eta, 7, 3)];
        while !matches!(evaluate(network, &mut alone).unwrap()[0], Outcome::Image(_)) {}

        // The others have their own samplers, step counts and classes, and are some way into them.
        let kinds = [
            Kind::Ddpm,
            Kind::Pndm,
            Kind::DpmSolverPlusPlus,
            Kind::EulerAncestral,
            Kind::Heun,
            Kind::Tcd,
            Kind::Lcm,
        ];
        let mut others = Vec::new();
        for (i, kind) in kinds.into_iter().enumerate() {
            let mut other = [sample(&model, kind, 20 + i, 0.0, 100 + i as u64, i as u32)];
            for _ in 0..i {
                evaluate(network, &mut other).unwrap();
            }
            others.extend(other);
        }
        // It stands in the middle, so that both its neighbours are strangers.
        let mut batch: Vec<Sample> = others.drain(..4).collect();
        batch.push(sample(&model, kind, 8, eta, 7, 3));
        batch.append(&mut others);
        while !matches!(evaluate(network, &mut batch).unwrap()[4], Outcome::Image(_)) {}

        assert_eq!(latent(&alone[0]), latent(&batch[4]), "{kind}");
    }
}

#[test]
fn previews_are_spread_over_the_trajectory() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/zoo/fashion-mnist-teacher");
    let model = Model::from_folder_for_test(&folder);
    let request = GenerateRequest {
        model: Arc::clone(&model),
        samples: vec![SampleSpec { seed: 1, class_label: Some(0) }],
        trajectory: sampler::trajectory(&model.schedule, Kind::Ddim, 8, 0.0, false).unwrap(),
        prompts: Vec::new(),
        start: Start::Noise,
        guidance_scale: 1.0,
        partial_images: 3,
        deadline: None,
    };
    let (reply, _) = mpsc::unbounded_channel();
    let mut samples = Sample::images(request, &[], false, &reply, || SampleKey(0));
    let mut previews = Vec::new();
    for evaluation in 1..=8 {
        match evaluate(model.on(0), &mut samples).unwrap().remove(0) {
            Outcome::Going(preview) => previews.extend(preview.map(|(i, _)| (evaluation, i))),
            Outcome::Image(_) => assert_eq!(evaluation, 8),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(previews, [(2, 0), (4, 1), (6, 2)]);
}
