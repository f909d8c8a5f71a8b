//! Against pytorch-fid and torch-fidelity: `tests/golden/make_evaluation.py` made the numbers.

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};
use serde_json::Value;
use tempfile::tempdir;
use understudy_models::checkpoint::Draft;

use super::{
    FeatureNetwork, Gaussian, Inception, InceptionScore, Judge, Moments, Observed, Observer,
    Reference, compare, frechet_distance,
    judge::{JudgeConfig, Training, train},
    kernel_distance, precision_and_recall,
};
use crate::{data::Images, npz};

fn golden() -> Value {
    serde_json::from_str(include_str!("../../tests/golden/evaluation.json")).expect("JSON")
}

/// The script's `formula`.
fn formula(count: usize, seed: u32) -> Vec<f32> {
    let number = |index: u32| {
        let mut x = index.wrapping_add(seed.wrapping_mul(0x9E37_79B9));
        x = (x ^ (x >> 16)).wrapping_mul(0x85EB_CA6B);
        x = (x ^ (x >> 13)).wrapping_mul(0xC2B2_AE35);
        x ^= x >> 16;
        (f64::from(x >> 8) / f64::from(1 << 23) - 1.0) as f32
    };
    (0..count as u32).map(number).collect()
}

fn tensor(values: Vec<f32>, shape: &[usize]) -> Tensor {
    Tensor::from_vec(values, shape, &Device::Cpu).expect("a tensor")
}

/// The two sets of features, f32 `[60, 8]`.
fn sets() -> (Tensor, Tensor) {
    let b = formula(480, 2).into_iter().map(|x| x * 0.75 + 0.125).collect();
    (tensor(formula(480, 1), &[60, 8]), tensor(b, &[60, 8]))
}

fn gaussian(features: &Tensor, batch: usize) -> Gaussian {
    let (rows, width) = features.dims2().expect("a table");
    let mut moments = Moments::new(width);
    for begin in (0..rows).step_by(batch) {
        let part = features.narrow(0, begin, batch.min(rows - begin)).expect("rows");
        moments.add(&part).expect("added");
    }
    moments.gaussian().expect("two or more")
}

fn close(ours: f64, theirs: &Value, relative: f64) {
    let theirs = theirs.as_f64().expect("a number");
    assert!((ours - theirs).abs() <= relative * theirs.abs(), "{ours}, not {theirs}");
}

#[test]
fn frechet_distance_is_pytorch_fids() {
    let (a, b) = sets();
    let distance = frechet_distance(&gaussian(&a, 7), &gaussian(&b, 60)).expect("a distance");
    close(distance, &golden()["frechet"], 1e-6);
    let itself = frechet_distance(&gaussian(&a, 7), &gaussian(&a, 13)).expect("a distance");
    assert!(itself.abs() < 1e-12, "{itself}");
}

#[test]
fn kernel_distance_is_torch_fidelitys() {
    let (a, b) = sets();
    let (a, b) = (a.to_dtype(DType::F64).expect("f64"), b.to_dtype(DType::F64).expect("f64"));
    // One subset of all images is the same whatever drew it.
    let (distance, deviation) = kernel_distance(&a, &b, 1, 60, 5).expect("a distance");
    close(distance, &golden()["kernel"], 1e-9);
    assert_eq!(deviation, 0.0);
    let (smaller, deviation) = kernel_distance(&a, &b, 50, 40, 5).expect("a distance");
    assert!((smaller - distance).abs() < 0.05 && deviation > 0.0, "{smaller} ± {deviation}");
    assert_eq!(kernel_distance(&a, &b, 50, 40, 5).expect("again").0, smaller);
}

#[test]
fn precision_and_recall_are_torch_fidelitys() {
    let (a, b) = sets();
    let (a, b) = (a.to_dtype(DType::F64).expect("f64"), b.to_dtype(DType::F64).expect("f64"));
    let (precision, recall) = precision_and_recall(&a, &b).expect("both");
    close(precision, &golden()["precision"], 1e-6);
    close(recall, &golden()["recall"], 1e-6);
}

#[test]
fn inception_score_is_torch_fidelitys() {
    let logits = formula(970, 3).into_iter().map(|x| x * 4.0).collect();
    let logits = tensor(logits, &[97, 10]);
    let mut score = InceptionScore::new(97, None);
    for begin in (0..97).step_by(20) {
        let part = logits.narrow(0, begin, 20.min(97 - begin)).expect("rows");
        score.add(&part).expect("added");
    }
    let (mean, deviation) = score.finish().expect("enough");
    close(mean, &golden()["inception_score"][0], 1e-6);
    close(deviation, &golden()["inception_score"][1], 1e-6);
    assert!(score.add(&logits).is_err(), "more than were announced");
}

#[test]
fn inception_scores_of_images_class_by_class_are_those_of_a_mixture() {
    // Two hundred images of each of ten classes, each known for sure.
    let logits = |class: usize| (0..10).map(move |it| if it == class { 50.0 } else { 0.0 });
    let logits = (0..2000).flat_map(|image| logits(image / 200)).collect();
    let logits = tensor(logits, &[2000, 10]);
    let score = |shuffled| {
        let mut score = InceptionScore::new(2000, shuffled);
        score.add(&logits).expect("added");
        score.finish().expect("enough").0
    };
    assert!((score(None) - 1.0).abs() < 1e-6);
    assert!(score(Some(0)) > 9.5);
}

/// pytorch-fid's state dict with the script's weights.
fn inception_weights() -> HashMap<String, Tensor> {
    let golden = golden();
    let convolutions = golden["inception"]["convolutions"].as_object().expect("an object");
    let mut names = vec![("fc.weight".into(), vec![1008, 2048]), ("fc.bias".into(), vec![1008])];
    for (name, shape) in convolutions {
        let shape: Vec<usize> = serde_json::from_value(shape.clone()).expect("a shape");
        for part in ["weight", "bias", "running_mean", "running_var"] {
            names.push((format!("{name}.bn.{part}"), vec![shape[0]]));
        }
        names.push((format!("{name}.conv.weight"), shape));
    }
    names.sort();
    let mut weights = HashMap::new();
    for (seed, (name, shape)) in names.into_iter().enumerate() {
        let count = shape.iter().product();
        let fan_in: usize = shape.get(1..).unwrap_or_default().iter().product();
        let scale = (6.0 / fan_in as f64).sqrt() as f32;
        let number = |x: f32| match name.rsplit('.').next() {
            _ if name.ends_with("conv.weight") => x * scale,
            _ if name.ends_with("bn.weight") => 1.0 + x / 8.0,
            Some("running_var") => 1.0 + x / 2.0,
            _ if name.ends_with("fc.weight") => x / 32.0,
            _ => x / 8.0,
        };
        let values = formula(count, seed as u32).into_iter().map(number).collect();
        weights.insert(name, tensor(values, &shape));
    }
    weights
}

/// The script's images.
fn images(seed: u32) -> Images {
    let numbers = formula(6 * 20 * 24 * 3, seed);
    let pixels = numbers.chunks(20 * 24 * 3).enumerate().flat_map(|(i, numbers)| {
        let contrast = (0.2 + 0.14 * i as f64) as f32;
        numbers.iter().map(move |x| (128.0 + 127.0 * contrast * x).clamp(0.0, 255.0) as u8)
    });
    Images {
        channels: 3,
        height: 20,
        width: 24,
        pixels: pixels.collect(),
        labels: None,
        ..Images::default()
    }
}

#[test]
fn inception_is_pytorch_fids() {
    let network = Inception::new(&inception_weights()).expect("a network");
    let observe = |seed: u32| -> Observed {
        let batch = images(seed).batch(&[0, 1, 2, 3, 4, 5], &Device::Cpu).expect("a batch");
        network.observe(&batch).expect("observed")
    };
    let (a, b) = (observe(4), observe(5));
    let golden = &golden()["inception"];
    for (ours, theirs) in [(&a.features, &golden["features"]), (&a.logits, &golden["logits"])] {
        for row in 0..2 {
            let ours: Vec<f32> = ours.get(row).and_then(|row| row.to_vec1()).expect("a row");
            let theirs = theirs[row].as_array().expect("a row");
            assert_eq!(theirs.len(), ours.len().div_ceil(16));
            for (ours, theirs) in ours.iter().step_by(16).zip(theirs) {
                let theirs = theirs.as_f64().expect("a number");
                let bound = 1e-4 * theirs.abs().max(1.0);
                assert!((f64::from(*ours) - theirs).abs() < bound, "{ours}, not {theirs}");
            }
        }
    }
    let fid = frechet_distance(&gaussian(&a.features, 6), &gaussian(&b.features, 6));
    close(fid.expect("a distance"), &golden["fid"], 1e-3);
}

#[test]
fn inception_refuses_a_convolution_of_another_shape() {
    let mut weights = inception_weights();
    let name = "Mixed_6c.branch7x7_2.conv.weight";
    let turned = weights[name].transpose(2, 3).and_then(|weight| weight.contiguous());
    weights.insert(name.into(), turned.expect("turned"));
    assert!(Inception::new(&weights).is_err());
}

/// Classes that a judge of 32×32 images can tell: a bright stripe, upright or lying.
fn stripes(count: usize, seed: u32) -> Images {
    let places = formula(count, seed);
    let mut pixels = vec![0; count * 1024];
    for (i, image) in pixels.chunks_exact_mut(1024).enumerate() {
        let place = (16.0 + 12.0 * places[i]) as usize;
        for along in 0..32 {
            let at = if i % 2 == 0 { along * 32 + place } else { place * 32 + along };
            image[at] = 255;
        }
    }
    let labels = Some((0..count as u32).map(|i| i % 2).collect());
    Images { channels: 1, height: 32, width: 32, pixels, labels, ..Images::default() }
}

#[test]
fn judge_learns_and_is_read_back_and_scores() {
    let training = Training { name: "stripes".into(), epochs: 4, seed: 3 };
    let (set, test) = (stripes(640, 1), stripes(200, 2));
    let mut losses = Vec::new();
    let (config, tensors) =
        train(&training, &set, &test, |_, _, loss| losses.push(loss)).expect("trained");
    assert!(config.test_accuracy > 0.95, "{}: {losses:?}", config.test_accuracy);
    let short = Training { epochs: 1, ..training };
    let once = || train(&short, &stripes(128, 1), &test, |_, _, _| {}).expect("trained").1;
    let again = once();
    for (name, tensor) in &once() {
        let apart = (tensor - &again[name]).and_then(|d| d.abs()?.flatten_all()?.max(0));
        assert_eq!(apart.and_then(|d| d.to_scalar::<f32>()).expect("a number"), 0.0, "{name}");
    }

    let folder = tempdir().expect("a folder");
    let place = folder.path().join("stripes");
    super::judge::write(Draft::new(&place).expect("a draft"), &config, &tensors).expect("written");
    let judge = Judge::open(&place).expect("a judge");
    assert_eq!(judge.distance(), "FD-stripes");
    assert!(Draft::new(&place).is_err(), "nothing is overwritten");

    let mut reference = Observer::new(&judge, "--reference", 640, 200).expect("enough");
    reference.add(&set).expect("seen");
    let reference = Reference::from_images(reference).expect("a reference");
    let mut samples = Observer::new(&judge, "--samples", 200, 200).expect("enough");
    samples.add(&test).expect("seen");
    let scores = compare(&samples, &reference).expect("scores");
    let gaussian = samples.gaussian().expect("a Gaussian");
    let spread: f64 = (0..128).map(|i| gaussian.covariance[i * 129]).sum();
    assert!(scores.distance >= 0.0 && scores.distance < spread, "{scores:?} of {spread}");
    assert_eq!(scores.class_agreement, Some(config.test_accuracy));
    let (precision, recall) = scores.precision_and_recall.expect("kept");
    assert!(precision > 0.5 && recall > 0.5, "{scores:?}");
}

/// A network whose features are the first pixels.
struct Pixels;

impl FeatureNetwork for Pixels {
    fn name(&self) -> &str {
        "pixels"
    }

    fn width(&self) -> usize {
        3
    }

    fn input(&self) -> Option<(usize, usize, usize)> {
        Some((1, 2, 2))
    }

    fn batch(&self) -> usize {
        4
    }

    fn observe(&self, images: &Tensor) -> candle_core::Result<Observed> {
        let features = images.flatten_from(1)?.narrow(1, 0, 3)?;
        Ok(Observed { logits: features.clone(), features })
    }
}

#[test]
fn too_few_samples_are_refused_before_work() {
    let refused = Observer::new(&Pixels, "--n", 3, 0).err().expect("refused").to_string();
    assert!(refused.contains("`--n` is 3 images") && refused.contains("at least 4"), "{refused}");
    assert!(Observer::new(&Pixels, "--n", 4, 0).is_ok());
}

#[test]
fn statistics_are_read_back_and_other_networks_are_refused() {
    let folder = tempdir().expect("a folder");
    let path = folder.path().join("stats.npz");
    let features = tensor(formula(60, 9), &[20, 3]);
    let gaussian = gaussian(&features, 20);
    gaussian.write(&path, &Pixels).expect("written");
    assert_eq!(Gaussian::find(&path, &Pixels).expect("read"), Some(gaussian.clone()));
    assert_eq!(Gaussian::open(&path, &Pixels).expect("read"), gaussian);

    let config = JudgeConfig {
        name: "another".into(),
        channels: 3,
        height: 1,
        width: 1,
        layers: Vec::new(),
        classes: 1,
        test_accuracy: 0.0,
        recipe: serde_json::Map::new(),
    };
    let head = [("head.weight", vec![1, 3]), ("head.bias", vec![1])];
    let head = head
        .map(|(name, shape)| (name.to_owned(), tensor(vec![0.0; shape.iter().product()], &shape)));
    let judge = Judge::new(config, &HashMap::from(head)).expect("a judge");
    let refused = Gaussian::open(&path, &judge).expect_err("refused").to_string();
    assert!(refused.contains("statistics of pixels, not of another"), "{refused}");

    // Without a name they might be anybody's.
    let array = |shape: &[usize]| npz::Array {
        shape: shape.to_vec(),
        values: npz::Values::F64(vec![0.0; shape.iter().product()]),
    };
    npz::write(&path, &[("mu", array(&[3])), ("sigma", array(&[3, 3]))]).expect("written");
    assert!(Gaussian::open(&path, &Pixels).is_err());
    npz::write(&path, &[("mu", array(&[3]))]).expect("written");
    assert!(Gaussian::open(&path, &Pixels).is_err());
    std::fs::write(&path, b"PK").expect("written");
    let refused = Gaussian::open(&path, &Pixels).expect_err("refused").to_string();
    assert!(refused.contains("stats.npz: not a whole .npz archive"), "{refused}");
}

/// Statistics of [`Pixels`], and whatever else, under a name that says nothing.
fn archive(
    mu: &[f64],
    sigma: &[f64],
    network: &str,
    images: bool,
) -> (tempfile::TempDir, std::path::PathBuf) {
    let folder = tempdir().expect("a folder");
    let path = folder.path().join("REFERENCE.NPZ");
    let array = |shape: Vec<usize>, values| npz::Array { shape, values };
    let mut arrays = vec![
        ("mu", array(vec![3], npz::Values::F64(mu.to_vec()))),
        ("sigma", array(vec![3, 3], npz::Values::F64(sigma.to_vec()))),
        ("features", array(vec![], npz::Values::Text(network.into()))),
    ];
    if images {
        arrays.push(("arr_0", array(vec![1, 2, 2], npz::Values::U8(vec![0; 4]))));
    }
    npz::write(&path, &arrays).expect("written");
    (folder, path)
}

const UNIT: [f64; 9] = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0];

#[test]
fn statistics_are_known_by_content_and_give_way_to_images_beside_anothers() {
    let find = |network: &str, images| {
        let (_folder, path) = archive(&[0.0; 3], &UNIT, network, images);
        Gaussian::find(&path, &Pixels).map_err(|error| error.to_string())
    };
    assert!(find("pixels", false).expect("read").is_some());
    assert!(find("pixels", true).expect("read").is_some());
    assert!(find("another", true).expect("images are there").is_none());
    assert!(find("another", false).expect_err("refused").contains("statistics of another"));
}

#[test]
fn what_is_no_covariance_is_refused() {
    let read = |sigma: [f64; 9]| {
        let (_folder, path) = archive(&[0.0; 3], &sigma, "pixels", false);
        Gaussian::open(&path, &Pixels).map_err(|error| error.to_string())
    };
    // Symmetric to f32, and of rank 1 to f32: what rounding leaves of good statistics.
    let mut rounded = [1.0; 9];
    rounded[1] += 1e-7;
    rounded[8] -= 1e-7;
    assert!(read(rounded).is_ok());
    assert!(read([0.0; 9]).is_ok());
    let mut upper = UNIT;
    (upper[1], upper[2], upper[5]) = (0.5, 0.2, 0.1);
    assert!(read(upper).expect_err("refused").contains("not symmetric"));
    let mut indefinite = UNIT;
    (indefinite[1], indefinite[3]) = (2.0, 2.0);
    assert!(read(indefinite).expect_err("refused").contains("negative"));
    let mut negative = UNIT;
    negative[4] = -0.5;
    assert!(read(negative).expect_err("refused").contains("[1, 1]"));
    let mut infinite = UNIT;
    infinite[4] = f64::INFINITY;
    assert!(read(infinite).expect_err("refused").contains("infinity"));
}

#[test]
fn a_distance_is_never_negative_nor_beyond_numbers() {
    for seed in 0..20 {
        let features = tensor(formula(480, seed), &[60, 8]);
        let one = gaussian(&features, 60);
        assert!(frechet_distance(&one, &one).expect("a distance") >= 0.0);
    }
    let far = Gaussian { mean: vec![1e200; 3], covariance: UNIT.to_vec() };
    let near = Gaussian { mean: vec![0.0; 3], covariance: UNIT.to_vec() };
    assert!(frechet_distance(&far, &near).is_err());
}

#[test]
fn a_label_beyond_all_images_is_refused() {
    let mut set = stripes(4, 1);
    assert!(super::judge::check_classes(&set).is_ok());
    set.labels = Some(vec![0, 1, u32::MAX, 1]);
    let problem = super::judge::check_classes(&set).expect_err("refused");
    assert!(problem.contains("4 images") && problem.contains("4294967295"), "{problem}");
}

/// Gray 2×2 images of these brightnesses, each with a caption.
fn captioned(images: &[(u8, &str)]) -> Images {
    Images {
        channels: 1,
        height: 2,
        width: 2,
        pixels: images.iter().flat_map(|(gray, _)| [*gray; 4]).collect(),
        captions: Some(images.iter().map(|(_, caption)| (*caption).to_owned()).collect()),
        ..Images::default()
    }
}

#[test]
fn the_nearest_captioned_picture_tells_what_a_sample_shows() {
    let seen = |images: &[(u8, &str)]| {
        let mut observer = Observer::new(&Pixels, "--n", images.len(), 0).expect("enough");
        observer.add(&captioned(images)).expect("seen");
        observer
    };
    let pictures = [(0, "night"), (60, "dusk"), (120, "fog"), (180, "cloud"), (255, "snow")];
    let reference = || Reference::from_images(seen(&pictures)).expect("a reference");
    // Two of three show what was asked for; nobody knows what the fourth should look like.
    let samples = seen(&[(10, "night"), (170, "cloud"), (65, "snow"), (255, "a flash")]);
    let scores = compare(&samples, &reference()).expect("scores");
    assert_eq!(scores.prompt_adherence, Some(2.0 / 3.0));
    let samples = seen(&[(10, "a"), (170, "b"), (65, "c"), (255, "d")]);
    assert_eq!(compare(&samples, &reference()).expect("scores").prompt_adherence, None);
}
