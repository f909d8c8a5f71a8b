//! A picture of latency against rate.

use plotters::element::DashedPathElement;
use plotters::prelude::*;

use super::Run;

/// Of the whole picture, in pixels.
const SIZE: (u32, u32) = (760, 420);
const FONT: (&str, u32) = ("system-ui, sans-serif", 13);
/// At least 4.5 : 1 in contrast to white.
const COLOURS: [RGBColor; 6] = [
    RGBColor(11, 92, 173),
    RGBColor(179, 66, 10),
    RGBColor(26, 127, 55),
    RGBColor(130, 80, 223),
    RGBColor(168, 50, 126),
    RGBColor(87, 96, 106),
];

/// Corners of a diamond, a square and a triangle, so that curves can be told apart without their colours.
const MARKS: [&[(i32, i32)]; 3] = [
    &[(0, -5), (5, 0), (0, 5), (-5, 0)],
    &[(-4, -4), (4, -4), (4, 4), (-4, 4)],
    &[(0, -5), (5, 4), (-5, 4)],
];

/// A model of a mix at all rates.
struct Curve<'a> {
    mix: &'a str,
    name: String,
    points: Vec<Point>,
}

/// Of a model at one rate.
#[derive(Clone, Copy)]
struct Point {
    rate: f64,
    p50_ms: f64,
    p99_ms: f64,
    /// Whether every request had its images.
    complete: bool,
}

/// A standalone SVG: for each model of each mix the median and the 99th percentile of its latency, in
/// milliseconds on a logarithmic scale, against the rate offered. Points are hollow where requests were
/// refused or failed. `None` where no run has a latency.
///
/// # Errors
/// What the library says.
pub fn svg(runs: &[Run]) -> Result<Option<String>, String> {
    let curves = curves(runs);
    let points = || curves.iter().flat_map(|curve| &curve.points);
    if points().next().is_none() {
        return Ok(None);
    }
    let mut text = String::new();
    draw(&curves, &mut text).map_err(|error| format!("a plot could not be drawn: {error}"))?;
    Ok(Some(text))
}

type Outcome<'a> = Result<(), DrawingAreaErrorKind<<SVGBackend<'a> as DrawingBackend>::ErrorType>>;

fn draw<'a>(curves: &[Curve], text: &'a mut String) -> Outcome<'a> {
    let points = || curves.iter().flat_map(|curve| &curve.points);
    let least = points().map(|point| point.p50_ms).fold(f64::INFINITY, f64::min);
    let most = points().map(|point| point.p99_ms).fold(0.0, f64::max);
    let fastest = points().map(|point| point.rate).fold(0.0, f64::max);
    let levels = levels(least, most);
    let (low, high) = (levels[0], levels[levels.len() - 1]);
    let area = SVGBackend::with_string(text, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&area)
        .margin(12)
        .margin_right(24)
        .x_label_area_size(44)
        .y_label_area_size(60)
        .build_cartesian_2d(0.0..fastest * 1.04, (low..high).log_scale().with_key_points(levels))?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(TRANSPARENT)
        .x_label_formatter(&|rate| format!("{}", (rate * 1e6).round() / 1e6))
        .y_label_formatter(&|level| level.to_string())
        .x_desc("requests per second offered")
        .y_desc("ms")
        .label_style(FONT)
        .draw()?;
    for (i, curve) in curves.iter().enumerate() {
        let colour = COLOURS[i % COLOURS.len()];
        let line = colour.stroke_width(2);
        let mark = MARKS[i % MARKS.len()];
        let p50 = || curve.points.iter().map(|point| (point.rate, point.p50_ms));
        let p99 = || curve.points.iter().map(|point| (point.rate, point.p99_ms));
        chart
            .draw_series(LineSeries::new(p50(), line))?
            .label(format!("{} p50", curve.name))
            .legend(move |at| {
                let middle = |&(x, y): &(i32, i32)| (x + 13, y);
                let mark =
                    Polygon::new(mark.iter().map(middle).collect::<Vec<_>>(), colour.filled());
                EmptyElement::at(at) + PathElement::new([(0, 0), (26, 0)], line) + mark
            });
        chart
            .draw_series(DashedLineSeries::new(p99(), 6, 4, line))?
            .label(format!("{} p99", curve.name))
            .legend(move |(x, y)| DashedPathElement::new([(x, y), (x + 26, y)], 6, 4, line));
        for (at, point) in p50().zip(&curve.points).chain(p99().zip(&curve.points)) {
            let inside = if point.complete { colour } else { WHITE };
            let outline: Vec<_> = mark.iter().chain(&mark[..1]).copied().collect();
            let inside = Polygon::new(mark, inside.filled());
            chart.draw_series([EmptyElement::at(at) + inside + PathElement::new(outline, line)])?;
        }
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .label_font(FONT)
        .background_style(WHITE.mix(0.85))
        .border_style(TRANSPARENT)
        .draw()?;
    area.present()
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
            let (p50_ms, p99_ms) = (latency.p50, latency.p99);
            let point = Point { rate: run.rate, p50_ms, p99_ms, complete };
            match curves.iter_mut().find(|curve| curve.mix == run.mix && curve.name == name) {
                Some(curve) => curve.points.push(point),
                None => curves.push(Curve { mix: &run.mix, name, points: vec![point] }),
            }
        }
    }
    for curve in &mut curves {
        curve.points.sort_by(|a, b| a.rate.total_cmp(&b.rate));
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
        let svg = svg(&[at(4.0, 3), at(1.0, 0), at(2.0, 0)]).unwrap().unwrap();
        // Two models, three rates, p50 and p99 of each; in the key a mark for each model. White is also the ground.
        let marks = |colour: &str| {
            svg.matches(&format!("<polygon opacity=\"1\" fill=\"{colour}\"")).count()
        };
        assert_eq!(marks("#FFFFFF"), 2, "both points of the rate with refusals are hollow: {svg}");
        assert_eq!((marks("#0B5CAD"), marks("#B3420A")), (4 + 1, 6 + 1), "{svg}");
        for text in ["teacher p50", "student p99", "requests per second offered"] {
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
        assert!(svg(&both[..1]).unwrap().unwrap().contains("<svg"));
        assert!(svg(&[]).unwrap().is_none());
    }
}
