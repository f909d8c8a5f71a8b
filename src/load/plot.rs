//! A picture of latency against rate.
//!
//! Written here and not with a plotting library: one picture of a fixed kind, whose colours follow the
//! reader's light or dark scheme through a style sheet, which such libraries do not write.

use std::fmt::Write;

use super::Run;

/// Of the whole picture, in pixels.
const SIZE: (f64, f64) = (760.0, 420.0);
/// Left, top, right and bottom of the part with the curves.
const AREA: (f64, f64, f64, f64) = (64.0, 52.0, 744.0, 372.0);
/// Colours on white, and on black: at least 4.5 : 1 in contrast.
const COLOURS: [(&str, &str); 6] = [
    ("#0b5cad", "#6cb6ff"),
    ("#b3420a", "#ff9a52"),
    ("#1a7f37", "#56d364"),
    ("#8250df", "#c297ff"),
    ("#a8327e", "#ff80c8"),
    ("#57606a", "#a8b1bb"),
];

/// A model of a mix at all rates.
struct Curve<'a> {
    mix: &'a str,
    name: String,
    /// Rate, median and 99th percentile in milliseconds, and whether every request had its images.
    points: Vec<(f64, f64, f64, bool)>,
}

/// A standalone SVG: for each model of each mix the median and the 99th percentile of its latency, in
/// milliseconds on a logarithmic scale, against the rate offered. Points are hollow where requests were
/// refused or failed. `None` where no run has a latency.
pub fn svg(runs: &[Run]) -> Option<String> {
    let curves = curves(runs);
    let points = || curves.iter().flat_map(|curve| &curve.points);
    let least = points().map(|&(_, p50, ..)| p50).fold(f64::INFINITY, f64::min);
    let most = points().map(|&(_, _, p99, _)| p99).fold(0.0, f64::max);
    let fastest = points().map(|&(rate, ..)| rate).fold(0.0, f64::max);
    points().next()?;
    let levels = levels(least, most);
    let (low, high) = (levels.first()?.ln(), levels.last()?.ln());
    let step =
        [1.0, 2.0, 5.0, 10.0].map(|unit| unit * 10f64.powf((fastest / 10.0).log10().floor()));
    let step = step.into_iter().find(|step| fastest / step <= 10.0)?;
    let widest = (fastest / step).ceil() * step;
    let (left, top, right, bottom) = AREA;
    let x = |rate: f64| left + (right - left) * rate / widest;
    let y = |milliseconds: f64| {
        bottom - (bottom - top) * (milliseconds.max(1e-6).ln() - low) / (high - low)
    };

    let mut svg = head();
    let mut line = |text: std::fmt::Arguments| {
        let _ = writeln!(svg, "{text}");
    };
    for &level in &levels {
        let at = y(level);
        line(format_args!(r#"<path class="grid" d="M{left} {at:.1}H{right}"/>"#));
        line(format_args!(
            r#"<text x="{}" y="{:.1}" class="end">{level}</text>"#,
            left - 8.0,
            at + 4.0
        ));
    }
    for i in 0..=(widest / step).round() as usize {
        let rate = i as f64 * step;
        let at = x(rate);
        // 0.30000000000000004 is 0.3.
        let rate = (rate * 1e6).round() / 1e6;
        line(format_args!(r#"<path class="grid" d="M{at:.1} {bottom}v5"/>"#));
        line(format_args!(r#"<text x="{at:.1}" y="{}" class="mid">{rate}</text>"#, bottom + 20.0));
    }
    let (middle, below) = ((left + right) / 2.0, bottom + 40.0);
    line(format_args!(
        r#"<text x="{middle}" y="{below}" class="mid">requests per second offered</text>"#
    ));
    line(format_args!(r#"<text x="{}" y="{}">ms</text>"#, left - 28.0, top - 12.0));

    let mut key = left;
    for (i, curve) in curves.iter().enumerate() {
        let colour = i % COLOURS.len();
        let path = |value: fn(&(f64, f64, f64, bool)) -> f64| {
            let points = curve.points.iter().enumerate().map(|(i, point)| {
                let pen = if i == 0 { 'M' } else { 'L' };
                format!("{pen}{:.1} {:.1}", x(point.0), y(value(point)))
            });
            points.collect::<String>()
        };
        line(format_args!(r#"<path class="c{colour} line" d="{}"/>"#, path(|point| point.1)));
        line(format_args!(r#"<path class="c{colour} line p99" d="{}"/>"#, path(|point| point.2)));
        for &(rate, p50, p99, complete) in &curve.points {
            let hollow = if complete { "" } else { " hollow" };
            for milliseconds in [p50, p99] {
                let mark = mark(i, x(rate), y(milliseconds));
                line(format_args!(r#"<path class="c{colour} mark{hollow}" d="{mark}"/>"#));
            }
        }
        for (what, class) in [("p50", ""), ("p99", " p99")] {
            let name = format!("{} {what}", curve.name);
            line(format_args!(r#"<path class="c{colour} line{class}" d="M{key:.0} 20h26"/>"#));
            line(format_args!(
                r#"<path class="c{colour} mark" d="{}"/>"#,
                mark(i, key + 13.0, 20.0)
            ));
            line(format_args!(r#"<text x="{:.0}" y="24">{name}</text>"#, key + 32.0));
            key += 48.0 + 7.2 * name.len() as f64;
        }
    }
    svg.push_str("</svg>\n");
    Some(svg)
}

fn head() -> String {
    let (width, height) = SIZE;
    let colours = |dark: bool| -> String {
        let each = COLOURS.iter().enumerate().map(|(i, &(light, black))| {
            format!(".c{i}{{--c:{}}}", if dark { black } else { light })
        });
        each.collect()
    };
    format!(
        r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-label="Latency against the rate of requests">
<style>
text{{font:13px system-ui,sans-serif;fill:#24292f}}
.end{{text-anchor:end}}.mid{{text-anchor:middle}}
.grid{{stroke:#8c959f;stroke-opacity:.35;fill:none}}
.line{{stroke:var(--c);stroke-width:2;fill:none}}.p99{{stroke-dasharray:6 4}}
.mark{{stroke:var(--c);stroke-width:2;fill:var(--c)}}.hollow{{fill:#fff}}
{}
@media(prefers-color-scheme:dark){{text{{fill:#d1d7de}}.hollow{{fill:#0d1117}}{}}}
</style>
"#,
        colours(false),
        colours(true)
    )
}

/// A disc, a square or a triangle, so that curves can be told apart without their colours.
fn mark(curve: usize, x: f64, y: f64) -> String {
    match curve % 3 {
        0 => format!("M{:.1} {y:.1}a4 4 0 1 0 8 0a4 4 0 1 0 -8 0", x - 4.0),
        1 => format!("M{:.1} {:.1}h7v7h-7z", x - 3.5, y - 3.5),
        _ => format!("M{:.1} {:.1}h9l-4.5 -8z", x - 4.5, y + 4.0),
    }
}

fn curves(runs: &[Run]) -> Vec<Curve<'_>> {
    let several = runs.iter().any(|run| run.mix != runs[0].mix);
    let mut curves: Vec<Curve<'_>> = Vec::new();
    for run in runs {
        for model in &run.models {
            let Some(latency) = model.latency_ms else { continue };
            let name = match several && run.models.len() > 1 {
                true => format!("{} of {}", model.name, run.mix),
                false => model.name.clone(),
            };
            let complete = model.accepted == model.requests();
            let point = (run.rate, latency.p50, latency.p99, complete);
            match curves.iter_mut().find(|curve| curve.mix == run.mix && curve.name == name) {
                Some(curve) => curve.points.push(point),
                None => curves.push(Curve { mix: &run.mix, name, points: vec![point] }),
            }
        }
    }
    for curve in &mut curves {
        curve.points.sort_by(|a, b| a.0.total_cmp(&b.0));
    }
    curves
}

/// 1, 2, 5, 10 … from the last that does not exceed `least` to the first that is not below `most`.
fn levels(least: f64, most: f64) -> Vec<f64> {
    let all = (-3..9).flat_map(|decade| [1.0, 2.0, 5.0].map(|unit| unit * 10f64.powi(decade)));
    let all: Vec<f64> = all.collect();
    let first = all.iter().rposition(|level| *level <= least).unwrap_or(0);
    let last = all.iter().position(|level| *level >= most).unwrap_or(all.len() - 1);
    all[first..=last.max(first + 1).min(all.len() - 1)].to_vec()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::load::{Figures, Percentiles};

    fn run(mix: &str, rate: f64, figures: &[(&str, f64, u64)]) -> Run {
        let models = figures.iter().map(|&(name, p50, refused_429)| Figures {
            name: name.into(),
            accepted: 10,
            refused_429,
            refused_other: 0,
            failed: 0,
            images_per_second: rate,
            latency_ms: Some(Percentiles { p50, p90: p50, p99: 4.0 * p50, max: 5.0 * p50 }),
            served_by: BTreeMap::new(),
            first_problem: None,
        });
        let models = models.collect();
        Run { mix: mix.into(), rate, seconds: 1.0, unfinished: 0, late_ms: None, models }
    }

    #[test]
    fn axes_cover_what_is_drawn() {
        assert_eq!(levels(3.0, 45.0), [2.0, 5.0, 10.0, 20.0, 50.0]);
        assert_eq!(levels(10.0, 10.0), [10.0, 20.0]);
        assert_eq!(levels(1e-9, 1e-9), [1e-3, 2e-3]);
    }

    #[test]
    fn every_model_has_two_curves_with_a_point_per_rate() {
        let at = |rate, refused| {
            run("teacher,student", rate, &[("teacher", 40.0 * rate, refused), ("student", 20.0, 0)])
        };
        let svg = svg(&[at(4.0, 3), at(1.0, 0), at(2.0, 0)]).unwrap();
        let curves: Vec<&str> = svg.lines().filter(|line| line.contains(" line")).collect();
        // Four curves of three points, and four lines of the key.
        assert_eq!(curves.len(), 8, "{svg}");
        assert_eq!(curves.iter().filter(|curve| curve.matches('L').count() == 2).count(), 4);
        assert_eq!(svg.matches(r#" hollow""#).count(), 2, "both points of the rate with refusals");
        for text in [">teacher p50<", ">student p99<", "prefers-color-scheme:dark"] {
            assert!(svg.contains(text), "{text}");
        }
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
    }

    #[test]
    fn mixes_in_turns_are_told_apart_and_one_rate_is_a_picture_too() {
        let names = |runs: &[Run]| -> Vec<String> {
            curves(runs).into_iter().map(|curve| curve.name).collect()
        };
        let each = [run("teacher", 1.0, &[("teacher", 5.0, 0)]), run("a,b", 1.0, &[("b", 5.0, 0)])];
        assert_eq!(names(&each), ["teacher", "b"]);
        let both =
            [run("a", 1.0, &[("a", 5.0, 0)]), run("a,b", 1.0, &[("a", 5.0, 0), ("b", 6.0, 0)])];
        assert_eq!(names(&both), ["a", "a of a,b", "b of a,b"]);
        assert!(svg(&both[..1]).unwrap().contains("<svg"));
        assert!(svg(&[]).is_none());
    }
}
