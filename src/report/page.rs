//! The page: one HTML file that loads nothing, with its pictures beside it as files.

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
};

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use understudy_distill::picture;
use understudy_models::{Image, checkpoint::write_atomically};

use super::{
    comparison::{Comparison, Pair, deviation, mean},
    plots, shown,
    training::Training,
    verdict::{Level, Verdict},
};

/// Pictures in a row of a grid.
const COLUMNS: usize = 10;
/// Width at which a grid is shown, in CSS pixels.
const GRID_WIDTH: usize = 460;

/// Writes the report of a comparison, and of the training that the student's folder remembers, into `folder`, and
/// gives its path. `samples` are the similarities of the run's grids to the teacher's: steps, dB.
///
/// # Errors
/// A sentence naming the file that could not be written.
pub(crate) fn write(
    folder: &Path,
    comparison: &Comparison,
    verdict: &Verdict,
    training: &Training,
    samples: &[(f64, f64)],
) -> Result<PathBuf, String> {
    fs::create_dir_all(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    let mut page = Page { folder, html: String::new() };
    page.head(comparison, verdict)?;
    page.pairs(comparison)?;
    page.scores(comparison);
    page.plots(comparison, training, samples)?;
    page.end(verdict, training);
    let path = folder.join("index.html");
    write_atomically(&path, page.html.as_bytes()).map_err(|error| error.to_string())?;
    Ok(path)
}

/// One of a pair's images.
type Of = fn(&Pair) -> &Image;

struct Page<'a> {
    folder: &'a Path,
    html: String,
}

impl Page<'_> {
    fn put(&mut self, text: std::fmt::Arguments<'_>) {
        // A string takes everything.
        let _ = self.html.write_fmt(text);
    }

    fn head(&mut self, comparison: &Comparison, verdict: &Verdict) -> Result<(), String> {
        let (teacher, student) = (escaped(&comparison.teacher), escaped(&comparison.student));
        let class = match verdict.level {
            Level::Good => "good",
            Level::Usable => "usable",
            Level::NotYet => "not-yet",
            Level::Unknown => "unknown",
        };
        let speed_up = comparison.speed_up().map_or("?".into(), |it| shown(it, None));
        let psnr = shown(mean(&comparison.psnr_db), None);
        let style = include_str!("page.css");
        self.put(format_args!(
            "<!doctype html>\n<html lang=\"en\">\n<meta charset=\"utf-8\">\n<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<title>{student} beside {teacher}</title>\n<style>\n{style}</style>\n<main>\n<h1>{student} <small>distilled from {teacher}</small></h1>\n<p class=\"verdict {class}\">{}</p>\n<dl class=\"figures\">\n<div><dt>speed-up</dt><dd>{speed_up} ×</dd></div>\n<div><dt>like the teacher’s images, same seeds</dt><dd>{psnr} dB</dd></div>\n",
            escaped(&verdict.sentence)
        ));
        if let Some(distance) = comparison.scores.iter().find(|it| it.name.starts_with("Fréchet"))
            && !comparison.against_teacher
            && let Some(ratio) = distance.ratio()
        {
            self.put(format_args!(
                "<div><dt>distance to the reference, teacher = 1</dt><dd>{} ×</dd></div>\n",
                shown(ratio, None)
            ));
        }
        self.put(format_args!("</dl>\n"));
        Ok(())
    }

    fn pairs(&mut self, comparison: &Comparison) -> Result<(), String> {
        self.put(format_args!("<h2>The same seeds</h2>\n<div class=\"pair\">\n"));
        let sides: [(&str, Of); 2] =
            [("teacher", |pair| &pair.teacher), ("student", |pair| &pair.student)];
        for (side, of) in sides {
            self.grid(side, side, &comparison.first, of)?;
        }
        self.put(format_args!(
            "</div>\n<h2>Where they differ most</h2>\n<p>The {} least alike of {} seeds, worst first.</p>\n<div class=\"pair\">\n",
            comparison.least_alike.len(),
            comparison.images * comparison.runs
        ));
        for (side, of) in sides {
            self.grid(&format!("least-alike-{side}"), side, &comparison.least_alike, of)?;
        }
        self.put(format_args!("</div>\n<table><tr><th>seed</th>"));
        for pair in &comparison.least_alike {
            self.put(format_args!("<td>{}</td>", pair.seed));
        }
        self.put(format_args!("</tr><tr><th>PSNR, dB</th>"));
        for pair in &comparison.least_alike {
            self.put(format_args!("<td>{:.1}</td>", pair.similarity.psnr_db));
        }
        if comparison.least_alike.iter().any(|pair| pair.class.is_some()) {
            self.put(format_args!("</tr><tr><th>class</th>"));
            for pair in &comparison.least_alike {
                self.put(format_args!("<td>{}</td>", pair.class.unwrap_or_default()));
            }
        }
        if comparison.least_alike.iter().any(|pair| pair.caption.is_some()) {
            self.put(format_args!("</tr><tr><th>prompt</th>"));
            for pair in &comparison.least_alike {
                let caption = pair.caption.as_deref().unwrap_or_default();
                self.put(format_args!("<td>{}</td>", escaped(caption)));
            }
        }
        self.put(format_args!("</tr></table>\n"));
        Ok(())
    }

    /// A grid of pictures, in the page and as a file.
    fn grid(&mut self, name: &str, caption: &str, pairs: &[Pair], of: Of) -> Result<(), String> {
        let images: Vec<Image> = pairs.iter().map(|pair| of(pair).clone()).collect();
        let Some(grid) = picture::grid(&images, COLUMNS.min(images.len().max(1))) else {
            return Ok(());
        };
        let path = self.folder.join(format!("{name}.png"));
        picture::write(&path, &grid).map_err(|error| error.to_string())?;
        let bytes = fs::read(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        let width = grid.width.max(GRID_WIDTH);
        self.put(format_args!(
            "<figure><img src=\"data:image/png;base64,{}\" width=\"{width}\" alt=\"{} images of the {caption}\"><figcaption>{caption}</figcaption></figure>\n",
            BASE64.encode(bytes),
            images.len()
        ));
        Ok(())
    }

    fn scores(&mut self, comparison: &Comparison) {
        self.put(format_args!(
            "<h2>Figures</h2>\n<table><tr><th>figure</th><th>teacher</th><th>student</th><th>student ÷ teacher</th></tr>\n"
        ));
        for row in rows(comparison) {
            self.put(format_args!(
                "<tr><th>{}</th><td>{}</td><td>{}</td><td>{}</td></tr>\n",
                escaped(&row[0]),
                row[1],
                row[2],
                row[3]
            ));
        }
        self.put(format_args!("</table>\n<p class=\"note\">{}</p>\n", escaped(&how(comparison))));
    }

    fn plots(
        &mut self,
        comparison: &Comparison,
        training: &Training,
        samples: &[(f64, f64)],
    ) -> Result<(), String> {
        self.put(format_args!("<h2>Speed and training</h2>\n<div class=\"plots\">\n"));
        self.plot("speed", "time of an evaluation by batch size", plots::speed(comparison)?)?;
        if training.log.len() > 1 {
            let losses = training.losses(200);
            let plot = plots::curve("Loss", "loss", &losses, true)?;
            self.plot("loss", "loss over training steps", plot)?;
        }
        if samples.len() > 1 {
            let title = "Samples: likeness to the teacher’s";
            let plot = plots::curve(title, "PSNR, dB", samples, false)?;
            self.plot("samples", "likeness of samples to the teacher's over training steps", plot)?;
        }
        self.put(format_args!("</div>\n"));
        Ok(())
    }

    fn plot(&mut self, name: &str, label: &str, svg: String) -> Result<(), String> {
        let path = self.folder.join(format!("{name}.svg"));
        write_atomically(&path, svg.as_bytes()).map_err(|error| error.to_string())?;
        self.put(format_args!("<figure role=\"img\" aria-label=\"{label}\">{svg}</figure>\n"));
        Ok(())
    }

    fn end(&mut self, verdict: &Verdict, training: &Training) {
        self.put(format_args!("<h2>What to do next</h2>\n<p>{}</p>\n", escaped(verdict.next)));
        if let Some(command) = &training.command {
            self.put(format_args!(
                "<h2>How it was made</h2>\n<pre>{}</pre>\n",
                escaped(command.trim_end())
            ));
            if let Some(last) = training.log.last() {
                self.put(format_args!(
                    "<p>{} steps in {:.0} minutes.</p>\n",
                    last.step,
                    last.seconds / 60.0
                ));
            }
        }
        self.put(format_args!("</main>\n</html>\n"));
    }
}

/// Rows of the table: what, the teacher's, the student's, their quotient.
pub(crate) fn rows(comparison: &Comparison) -> Vec<[String; 4]> {
    let figure = |values: &[f64]| shown(mean(values), deviation(values));
    let mut rows: Vec<[String; 4]> = Vec::new();
    for score in &comparison.scores {
        let arrow = if score.more_is_better { "↑" } else { "↓" };
        rows.push([
            format!("{} {arrow}", score.name),
            figure(&score.teacher),
            figure(&score.student),
            score.ratio().map_or("-".into(), |ratio| shown(ratio, None)),
        ]);
    }
    rows.push([
        "PSNR to the teacher, dB ↑".into(),
        "-".into(),
        figure(&comparison.psnr_db),
        "-".into(),
    ]);
    if !comparison.ssim.is_empty() {
        rows.push([
            "SSIM to the teacher ↑".into(),
            "-".into(),
            figure(&comparison.ssim),
            "-".into(),
        ]);
    }
    for speed in &comparison.speed {
        rows.push([
            format!("ms by image and evaluation, batch {} ↓", speed.batch),
            shown(speed.teacher_ms, None),
            shown(speed.student_ms, None),
            shown(1.0 / speed.ratio[0], None),
        ]);
        if speed.decode_ms > 0.0 {
            let decoding = shown(speed.decode_ms, None);
            let what = format!("ms by image to decode, batch {} ↓", speed.batch);
            rows.push([what, decoding.clone(), decoding, "1".into()]);
        }
    }
    rows
}

/// How it was measured, in sentences.
pub(crate) fn how(comparison: &Comparison) -> String {
    let Comparison { images, runs, steps, .. } = comparison;
    let steps = match steps {
        [teacher, student] if teacher == student => format!("{teacher} evaluations"),
        [teacher, student] => format!("{teacher} evaluations (teacher) and {student} (student)"),
    };
    let spread = if *runs > 1 { "; ± is the standard deviation between runs" } else { "" };
    let features = match (&comparison.features, comparison.against_teacher) {
        (None, _) => String::new(),
        (Some(name), true) => format!(
            " Distances are in the features of {name}, to {images} images that the teacher made from other seeds; they compare with no published figure."
        ),
        (Some(name), false) => format!(" Distances are in the features of {name}."),
    };
    format!(
        "{images} images of each model, {runs} {}, {steps} an image{spread}. ↑ more is better, ↓ less is.{features} Times are medians of rounds in turns.",
        if *runs == 1 { "run" } else { "runs" }
    )
}

/// Text as HTML takes it.
fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
