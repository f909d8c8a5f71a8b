//! `understudy quantize`: a model with products of 8 bits, without data.

use std::path::PathBuf;

use serde_json::json;
use understudy_distill::{
    generate::{Classes, Sampling},
    quantize::{self, Quantized},
};
use understudy_models::{
    checkpoint::{Draft, ModelFolder},
    noise, quantization, sampler,
};

use super::{folder_name, models_arg::ModelsArg, note_name, print, progress::Progress};

/// Quantise a U-Net to 8 bits (W8A8) without data, for `--dtype int8` on a CPU.
///
/// Calibrates on images that the model itself makes. diffusers loads the result like any other model.
#[derive(Debug, clap::Args)]
pub(super) struct QuantizeArgs {
    /// A model folder, a name inside --models, or a Hub id (owner/name).
    #[arg(long, value_name = "MODEL")]
    model: String,
    #[command(flatten)]
    models: ModelsArg,
    /// The model folder to make; must not exist yet.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Network steps of the images that are calibrated on; default: the model card's.
    #[arg(long)]
    steps: Option<usize>,
    /// Evaluations of single images to calibrate on; one image takes as many as it has steps.
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    rows: u32,
    /// Seed of the first image.
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u64).range(..noise::SEEDS))]
    seed: u64,
}

/// Images of an evaluation.
const BATCH: usize = 16;

/// Runs the command.
///
/// # Errors
/// A sentence naming what to mend.
pub(super) fn run(args: &QuantizeArgs) -> Result<(), String> {
    let folder = args.models.resolve("--model", &args.model)?;
    let explain = |error| format!("--model {}: {error}", args.model);
    let model = ModelFolder::open_for_images(&folder).map_err(explain)?;
    let draft = Draft::new(&args.out).map_err(|error| format!("--out: {error}"))?;
    note_name(&args.out);
    let card = &model.card;
    let steps = args.steps.unwrap_or_else(|| card.steps(&model.schedule));
    let kind = card.sampler(&model.schedule);
    let geometry = model.network.geometry();
    let (eta, learned) = (kind.default_eta(), geometry.learned_variance());
    let trajectory = sampler::trajectory(&model.schedule, kind, steps, eta, learned)
        .map_err(|error| format!("--steps: {error}"))?;
    let classes = Classes::all(geometry.conditioning, card.null_class).map_err(explain)?;
    let sampling =
        Sampling { trajectory, classes, captions: None, first_seed: args.seed, batch: BATCH };

    let mut progress = None;
    let made = quantize::quantize(&model, &sampling, args.rows as usize, |done, all| {
        progress.get_or_insert_with(|| Progress::new("Calibrating", 0, all)).at(done, "images");
    });
    drop(progress);
    let made = made.map_err(explain)?;
    let Quantized { weights, quantization, rows, saturated } = made;

    let mut card = model.card.of_weights();
    // They are another network's.
    card.scores.clear();
    let told = json!({
        "scheme": "W8A8", "from": folder_name(&folder), "rows": rows, "steps": steps,
        "scheduler": kind.name(), "seed": args.seed, "buckets": quantization.starts.len() + 1,
    });
    card.recipe.insert("quantization".into(), told);
    let codes = quantization.to_bytes().map_err(|error| error.to_string())?;
    let name = format!("{}/{}", model.network.component(), quantization::FILE);
    let size = codes.len();
    let write = || {
        draft.write(&name, &codes)?;
        let (network, schedule) = (&model.network, &model.schedule);
        ModelFolder::write_around(draft, network, &weights, schedule, &card, Some(&model))
    };
    write().map_err(|error| format!("--out: {error}"))?;
    let (share, layer) = saturated;
    let most = match share {
        0.0 => "no number of other images is outside of the ranges".into(),
        share => format!(
            "at most {:.2} % outside of the ranges in other images ({layer})",
            100.0 * share
        ),
    };
    let count = quantization.layers.len();
    let shown = args.out.display();
    print(format!(
        "Model saved to {shown}: {count} layers of 8 bits ({size} bytes of codes and scales), calibrated on {rows} \
         evaluations; {most}. Serve it:\n  {} --dtype int8",
        super::serve_command(&args.out, None)
    ))
}
