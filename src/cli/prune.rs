//! `understudy prune`: a smaller model out of a larger one's weights, without data.

use std::{collections::HashMap, path::PathBuf};

use serde_json::json;
use understudy_distill::{
    prune::{self, Fitted, Pruned, Settings, Stage},
    student::refuse_dropout,
    teacher::Teacher,
};
use understudy_models::{
    checkpoint::{
        Draft, ModelFolder,
        card::{Card, Role},
    },
    noise,
};

use super::{
    compute::Compute, folder_name, models_arg::ModelsArg, note_name, print, progress::Progress,
};

/// Make a smaller model out of a U-Net's most important parts, without data, as a student to begin with.
///
/// Widths of levels, attention and the middle block are chosen for a measured time, by what matters on noisy samples that the
/// model itself walks; what is kept is fitted to the model layer by layer. `understudy distill --student` teaches it the rest.
#[derive(Debug, clap::Args)]
pub(super) struct PruneArgs {
    /// A model folder, a name inside --models, or a Hub id (owner/name).
    #[arg(long, value_name = "MODEL")]
    model: String,
    #[command(flatten)]
    models: ModelsArg,
    /// Its part of the model's time per evaluation, as measured here, such as 0.5x.
    #[arg(long, value_name = "SHARE", value_parser = share)]
    time: f64,
    /// The model folder to make; must not exist yet.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Noisy samples on which layers are fitted.
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    rows: u32,
    /// Seed of the noisy samples.
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u64).range(..noise::SEEDS))]
    seed: u64,
    #[command(flatten)]
    pub(super) compute: Compute,
}

/// `0.5x` as a number between 0 and 1.
fn share(text: &str) -> Result<f64, String> {
    let share = text.strip_suffix('x').and_then(|number| number.parse().ok());
    share
        .filter(|share| *share > 0.0 && *share < 1.0)
        .ok_or_else(|| "write a part of the model's time above 0 and below 1, such as 0.5x".into())
}

/// Runs the command.
///
/// # Errors
/// A sentence naming what to mend.
pub(super) fn run(args: &PruneArgs) -> Result<(), String> {
    let (device, dtype) = args.compute.for_training()?;
    let folder = args.models.resolve("--model", &args.model)?;
    let explain = |error| format!("--model {}: {error}", args.model);
    let refuse = |problem: &str| Err(format!("--model {}: {problem}", args.model));
    let opened = ModelFolder::open_for_images(&folder).map_err(explain)?;
    if !opened.card.evaluations.is_empty() {
        return refuse("needs few evaluations an image; prune the student that it went on from");
    }
    if opened.quantization().map_err(explain)?.is_some() {
        return refuse("is quantised; prune the model that it was made from");
    }
    refuse_dropout(&opened.network).map_err(explain)?;
    let name = folder_name(&folder);
    let model = Teacher::open(&folder, name.clone(), dtype, &device).map_err(explain)?;
    let draft = Draft::new(&args.out).map_err(|error| format!("--out: {error}"))?;
    note_name(&args.out);

    let settings = Settings { share: args.time, rows: args.rows as usize, seed: args.seed };
    let mut progress = None;
    let made = prune::prune(&model, &settings, |stage| match stage {
        Stage::Floor => eprintln!("Measuring the smallest network."),
        Stage::Walking(done) => progress
            .get_or_insert_with(|| Progress::new("Walking samples", 0, 100))
            .at((100.0 * done) as usize, "percent"),
        Stage::Choosing => {
            progress = None;
            eprintln!("Measuring smaller networks.");
        }
        Stage::Fitting(share) => {
            eprintln!(
                "Found one that takes {share:.2} of the time per evaluation; fitting its layers."
            );
        }
    });
    let Pruned { reduced, fitted: Fitted { weights, rows, errors } } = made.map_err(explain)?;
    let parameters: usize = weights.values().map(candle_core::Tensor::elem_count).sum();
    let weights: HashMap<_, _> = weights.into_iter().collect();

    let mut card = Card { role: Role::Student, ..model.card.of_weights() };
    // A student that is pruned goes on being one of its teacher.
    card.teacher.get_or_insert_with(|| name.clone());
    // They are another network's.
    card.scores.clear();
    card.recipe.clear();
    let told = json!({
        "from": name, "from_sha256": model.hash, "time": args.time, "measured_time": reduced.share,
        "kept_importance": reduced.kept, "rows": rows, "seed": args.seed,
        "error_in_v": { "narrowed": errors[0], "fitted": errors[1] },
    });
    card.recipe.insert("pruning".into(), told);
    let around = Some(model.model());
    ModelFolder::write_around(draft, &reduced.config, &weights, &model.schedule, &card, around)
        .map_err(|error| format!("--out: {error}"))?;
    print(format!(
        "Model saved to {out}: {} of {} parameters, {:.2} of the time per evaluation. Its mean square error in v is {:.2e} on \
         samples that it was not fitted to, and {:.2e} without the fit; the better of the two is kept. Teach it the rest:\n  understudy distill \
         --teacher {} --student {out} --out {out}-distilled",
        super::grouped(parameters),
        super::grouped(model.network().parameters()),
        reduced.share,
        errors[1],
        errors[0],
        args.model,
        out = args.out.display(),
    ))
}
