//! Student and teacher, measured on the same seeds.

use std::time::Instant;

use candle_core::{Device, Error, Result, Tensor};
use serde::Serialize;
use understudy_distill::{
    estimate::timed_evaluation,
    evaluate::{FeatureNetwork, Observer, Reference, Scores, compare as score},
    generate::{Batch, Sampling},
};
use understudy_models::{Denoiser, Image, autoencoder::Decoder, noise};

use crate::{percentiles::sorted, similarity::Similarity};

/// A model to compare.
pub(crate) struct Side<'a> {
    /// Its name.
    pub(crate) id: &'a str,
    /// Its network.
    pub(crate) network: &'a dyn Denoiser,
    /// What makes images of a latent model's samples.
    pub(crate) decoder: Option<&'a Decoder>,
    /// Its sampler and steps; both sides have the same seeds, classes, captions and batches.
    pub(crate) sampling: &'a Sampling,
}

/// How much is measured.
pub(crate) struct Settings<'a> {
    /// Images of each model in a run.
    pub(crate) images: usize,
    /// Runs, each with seeds of its own.
    pub(crate) runs: usize,
    /// In which distances are taken; without one, and of no more images than it has features, images are compared
    /// pixel by pixel alone.
    pub(crate) features: Option<&'a dyn FeatureNetwork>,
    /// What both are held against; without one it is the teacher's images of other seeds.
    pub(crate) reference: Option<&'a Reference>,
}

/// A quantity of both.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Compared {
    /// What it is.
    pub(crate) name: String,
    /// Whether more is better.
    pub(crate) more_is_better: bool,
    /// The teacher's, one value a run.
    pub(crate) teacher: Vec<f64>,
    /// The student's, one value a run.
    pub(crate) student: Vec<f64>,
}

impl Compared {
    /// Student by teacher, of the means; nothing where the teacher's is not above 0, as a kernel distance may be.
    pub(crate) fn ratio(&self) -> Option<f64> {
        let (student, teacher) = (mean(&self.student), mean(&self.teacher));
        (teacher > 0.0).then(|| student / teacher)
    }
}

/// Time of an evaluation, by image. A guided image of a text-to-image model whose network takes no scale has two rows of
/// an evaluation.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Speed {
    /// Images evaluated together.
    pub(crate) batch: usize,
    /// Milliseconds by image that the teacher's decoder takes; 0 without one.
    pub(crate) decode_ms: f64,
    /// Milliseconds by image, the median of rounds in turns.
    pub(crate) teacher_ms: f64,
    /// Milliseconds by image, the median of rounds in turns.
    pub(crate) student_ms: f64,
    /// The median, least and greatest quotient of a round.
    pub(crate) ratio: [f64; 3],
}

/// One seed's images of both.
#[derive(Debug, Clone)]
pub(crate) struct Pair {
    /// Their seed.
    pub(crate) seed: u64,
    /// Their class.
    pub(crate) class: Option<u32>,
    /// What they were drawn after.
    pub(crate) caption: Option<String>,
    /// How alike they are.
    pub(crate) similarity: Similarity,
    /// The teacher's.
    pub(crate) teacher: Image,
    /// The student's.
    pub(crate) student: Image,
}

/// What was measured.
#[derive(Debug, Serialize)]
pub(crate) struct Comparison {
    /// The teacher's name.
    pub(crate) teacher: String,
    /// The student's name.
    pub(crate) student: String,
    /// Images of each model in a run.
    pub(crate) images: usize,
    /// Runs, each with seeds of its own.
    pub(crate) runs: usize,
    /// The feature network's name, where there was one and distances were taken.
    pub(crate) features: Option<String>,
    /// What the Fréchet distance in them is called.
    pub(crate) distance: Option<String>,
    /// How many features the network has, where there was one.
    pub(crate) feature_width: Option<usize>,
    /// Whether distances are to the teacher's own images.
    pub(crate) against_teacher: bool,
    /// Evaluations of each network for an image.
    pub(crate) steps: [usize; 2],
    /// Distances, scores.
    pub(crate) scores: Vec<Compared>,
    /// PSNR of student to teacher on the same seeds, dB, one mean a run.
    pub(crate) psnr_db: Vec<f64>,
    /// SSIM likewise; empty for images smaller than its window.
    pub(crate) ssim: Vec<f64>,
    /// By batch size.
    pub(crate) speed: Vec<Speed>,
    /// The first seeds.
    #[serde(skip)]
    pub(crate) first: Vec<Pair>,
    /// Those that are least alike, first.
    #[serde(skip)]
    pub(crate) least_alike: Vec<Pair>,
}

impl Comparison {
    /// The quotient of the models' times for whole images: of evaluations in batches of 8, or the largest measured, by
    /// the steps of each, and of decoding.
    pub(crate) fn speed_up(&self) -> Option<f64> {
        let at = self.speed.iter().find(|speed| speed.batch == 8).or(self.speed.last())?;
        let evaluations = [at.ratio[0] * at.student_ms, at.student_ms];
        let [teacher, student] =
            [0, 1].map(|i| evaluations[i] * self.steps[i] as f64 + at.decode_ms);
        Some(teacher / student)
    }
}

/// Pairs of the first seeds that are kept, and of those least alike.
const KEPT: [usize; 2] = [20, 10];
/// Batch sizes whose evaluations are timed.
const BATCHES: [usize; 5] = [1, 2, 4, 8, 16];
/// Rounds of them, teacher and student in turns.
const ROUNDS: usize = 5;
/// Larger batches are left out once all rounds of one take longer.
const LONG_SECONDS: f64 = 20.0;

/// Measures. `progress` is told the share that is done.
///
/// # Errors
/// Images of different shapes, a model whose images are not finite, and whatever the device says.
pub(crate) fn compare(
    teacher: &Side<'_>,
    student: &Side<'_>,
    settings: &Settings<'_>,
    progress: &mut dyn FnMut(f64),
) -> Result<Comparison> {
    let Settings { images, runs, .. } = *settings;
    let feature_width = settings.features.map(FeatureNetwork::width);
    let features = settings.features.filter(|network| images > network.width());
    let settings = &Settings { features, ..*settings };
    // The teacher's own images count as a run of one model.
    let sets = 2 * runs + usize::from(features.is_some() && settings.reference.is_none());
    let mut done = 0;
    let mut made = |images: usize| {
        done += images;
        progress(done as f64 / (sets * settings.images) as f64);
    };
    let own = own_reference(teacher, settings, &mut made)?;
    let reference = settings.reference.or(own.as_ref());
    let mut comparison = Comparison {
        teacher: teacher.id.to_owned(),
        student: student.id.to_owned(),
        images,
        runs,
        features: features.map(|network| network.name().to_owned()),
        distance: features.map(FeatureNetwork::distance),
        feature_width,
        against_teacher: settings.reference.is_none(),
        steps: [teacher, student].map(|side| side.sampling.trajectory.len()),
        scores: Vec::new(),
        psnr_db: Vec::new(),
        ssim: Vec::new(),
        speed: speed(teacher, student)?,
        first: Vec::new(),
        least_alike: Vec::new(),
    };
    for run in 0..runs {
        let mut seen = Seen::new(settings)?;
        let sampling = [teacher, student].map(|side| of_run(side, run, images));
        let teachers = sampling[0].batches(teacher.network, 0..images);
        let students = sampling[1].batches(student.network, 0..images);
        for (teachers, students) in teachers.zip(students) {
            let (teachers, students) = (teachers?, students?);
            made(2 * teachers.seeds.len());
            let pictures = [teachers.images(teacher.decoder)?, students.images(student.decoder)?];
            seen.add([&teachers, &students], pictures, &mut comparison)?;
        }
        seen.finish(reference, &mut comparison)?;
    }
    Ok(comparison)
}

/// What is gathered in a run.
struct Seen<'a> {
    /// Of the teacher's images, and of the student's.
    observers: Option<[Observer<'a>; 2]>,
    psnr_db: Vec<f64>,
    ssim: Vec<f64>,
}

impl<'a> Seen<'a> {
    fn new(settings: &Settings<'a>) -> Result<Self> {
        let observer = |network| observer(network, settings.images);
        let observers = settings.features.map(|it| Ok::<_, Error>([observer(it)?, observer(it)?]));
        Ok(Self { observers: observers.transpose()?, psnr_db: Vec::new(), ssim: Vec::new() })
    }

    /// Looks at a batch of both, of the same seeds.
    fn add(
        &mut self,
        [teachers, students]: [&Batch; 2],
        [theirs, ours]: [Vec<Image>; 2],
        comparison: &mut Comparison,
    ) -> Result<()> {
        if let Some([of_teacher, of_student]) = &mut self.observers {
            of_teacher.add(&teachers.set(&theirs))?;
            of_student.add(&students.set(&ours))?;
        }
        for (row, (teacher, student)) in theirs.into_iter().zip(ours).enumerate() {
            let Some(similarity) = Similarity::of(&teacher, &student) else {
                candle_core::bail!("their images differ in size or channels");
            };
            self.psnr_db.push(similarity.psnr_db);
            self.ssim.extend(similarity.ssim);
            let class = teachers.labels.as_ref().map(|labels| labels[row]);
            let caption = teachers.captions.as_ref().map(|captions| captions[row].clone());
            let seed = teachers.seeds[row];
            comparison.keep(Pair { seed, class, caption, similarity, teacher, student });
        }
        Ok(())
    }

    /// The run's scores.
    fn finish(self, reference: Option<&Reference>, comparison: &mut Comparison) -> Result<()> {
        comparison.psnr_db.push(mean(&self.psnr_db));
        if !self.ssim.is_empty() {
            comparison.ssim.push(mean(&self.ssim));
        }
        if let (Some([teacher, student]), Some(reference)) = (&self.observers, reference) {
            let (teacher, student) = (score(teacher, reference)?, score(student, reference)?);
            comparison.add_scores(&teacher, &student);
        }
        Ok(())
    }
}

impl Comparison {
    /// Keeps a pair that is among the first, or among those least alike.
    fn keep(&mut self, pair: Pair) {
        let place = |it: &Pair| it.similarity.psnr_db <= pair.similarity.psnr_db;
        let place = self.least_alike.partition_point(place);
        if place < KEPT[1] {
            self.least_alike.insert(place, pair.clone());
            self.least_alike.truncate(KEPT[1]);
        }
        if self.first.len() < KEPT[0] {
            self.first.push(pair);
        }
    }

    /// Adds the scores of a run.
    fn add_scores(&mut self, teacher: &Scores, student: &Scores) {
        type Score = fn(&Scores) -> Option<f64>;
        let of = if self.against_teacher {
            "to other images of the teacher"
        } else {
            "to the reference"
        };
        let distance = format!("Fréchet distance {of}");
        let scores: [(&str, bool, Score); 7] = [
            (&distance, false, |scores| Some(scores.distance)),
            ("Kernel distance (KID)", false, |scores| Some(scores.kernel_distance?.0)),
            ("Precision", true, |scores| Some(scores.precision_and_recall?.0)),
            ("Recall", true, |scores| Some(scores.precision_and_recall?.1)),
            ("Class agreement", true, |scores| scores.class_agreement),
            ("Prompt adherence", true, |scores| scores.prompt_adherence),
            ("Inception score", true, |scores| Some(scores.inception_score?.0)),
        ];
        for (name, more_is_better, score) in scores {
            let (Some(teacher), Some(student)) = (score(teacher), score(student)) else { continue };
            let known = self.scores.iter_mut().find(|it| it.name == name);
            if let Some(known) = known {
                known.teacher.push(teacher);
                known.student.push(student);
            } else {
                let (teacher, student) = (vec![teacher], vec![student]);
                let name = name.to_owned();
                self.scores.push(Compared { name, more_is_better, teacher, student });
            }
        }
    }
}

/// The teacher's images of seeds that no run has.
fn own_reference(
    teacher: &Side<'_>,
    settings: &Settings<'_>,
    made: &mut dyn FnMut(usize),
) -> Result<Option<Reference>> {
    let (Some(network), None) = (settings.features, settings.reference) else { return Ok(None) };
    let mut observer = observer(network, settings.images)?;
    let sampling = of_run(teacher, settings.runs, settings.images);
    for batch in sampling.batches(teacher.network, 0..settings.images) {
        let batch = batch?;
        made(batch.seeds.len());
        observer.add(&batch.set(&batch.images(teacher.decoder)?))?;
    }
    Reference::from_images(observer).map(Some)
}

fn observer(network: &dyn FeatureNetwork, images: usize) -> Result<Observer<'_>> {
    Observer::new(network, "--n", images, images).map_err(Error::wrap)
}

/// Run number `run` of `images` samples each: it has seeds of its own.
fn of_run(side: &Side<'_>, run: usize, images: usize) -> Sampling {
    let first_seed = (side.sampling.first_seed + (run * images) as u64) % noise::SEEDS;
    Sampling { first_seed, ..side.sampling.clone() }
}

/// Seconds of an image of a model, of `rows` that are made together. The first of a size is slower than those after it.
///
/// # Errors
/// Whatever the device says.
pub(crate) fn timed_image(
    network: &dyn Denoiser,
    decoder: Option<&Decoder>,
    sampling: &Sampling,
    rows: usize,
) -> Result<f64> {
    let evaluation =
        timed_evaluation(network, rows * sampling.rows(network)).map_err(Error::wrap)?.1;
    let decoding = timed_decoding(decoder, rows)?;
    Ok((evaluation * sampling.trajectory.len() as f64 + decoding) / rows as f64)
}

/// Seconds that a decoder takes for so many latents.
fn timed_decoding(decoder: Option<&Decoder>, rows: usize) -> Result<f64> {
    let Some(decoder) = decoder else { return Ok(0.0) };
    let [channels, height, width] = decoder.latent_shape();
    let shape = (rows, channels, height, width);
    let latents = Tensor::zeros(shape, decoder.dtype(), decoder.device())?;
    let began = Instant::now();
    decoder.forward(&latents)?.narrow(0, 0, 1)?.to_device(&Device::Cpu)?;
    Ok(began.elapsed().as_secs_f64())
}

/// Times evaluations of both in turns.
fn speed(teacher: &Side<'_>, student: &Side<'_>) -> Result<Vec<Speed>> {
    let mut all = Vec::new();
    for batch in BATCHES {
        let began = Instant::now();
        let mut rounds = Vec::with_capacity(ROUNDS);
        for round in 0..=ROUNDS {
            let time = |side: &Side| {
                let rows = batch * side.sampling.rows(side.network);
                Ok::<_, Error>(timed_evaluation(side.network, rows).map_err(Error::wrap)?.1)
            };
            let times = [time(teacher)?, time(student)?, timed_decoding(teacher.decoder, batch)?];
            // The first builds what the others have.
            if round > 0 {
                rounds.push(times);
            }
        }
        let sorted = |value: fn(&[f64; 3]) -> f64| sorted(rounds.iter().map(value));
        let by_image = 1e3 / batch as f64;
        let ratios = sorted(|times| times[0] / times[1]);
        all.push(Speed {
            batch,
            decode_ms: sorted(|times| times[2])[ROUNDS / 2] * by_image,
            teacher_ms: sorted(|times| times[0])[ROUNDS / 2] * by_image,
            student_ms: sorted(|times| times[1])[ROUNDS / 2] * by_image,
            ratio: [ratios[ROUNDS / 2], ratios[0], ratios[ROUNDS - 1]],
        });
        if began.elapsed().as_secs_f64() > LONG_SECONDS {
            break;
        }
    }
    Ok(all)
}

/// The mean; NaN of none.
pub(crate) fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// The standard deviation between runs (divisor N − 1); nothing of one.
pub(crate) fn deviation(values: &[f64]) -> Option<f64> {
    let mean = mean(values);
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    (values.len() > 1).then(|| (squares / (values.len() - 1) as f64).sqrt())
}
