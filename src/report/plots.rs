//! Plots, as SVG.

use plotters::{coord::ranged1d::ValueFormatter, prelude::*};

use super::comparison::Comparison;

const SIZE: (u32, u32) = (464, 260);
/// A logarithmic axis needs values of more than one order of magnitude to have labels.
const LOGARITHMIC: f64 = 20.0;
const FONT: &str = "system-ui, sans-serif";
const TEACHER: RGBColor = RGBColor(110, 110, 120);
const STUDENT: RGBColor = RGBColor(30, 100, 200);

/// A curve over training steps.
///
/// # Errors
/// What the library says.
pub(super) fn curve(
    title: &str,
    unit: &str,
    points: &[(f64, f64)],
    logarithmic: bool,
) -> Result<String, String> {
    let bounds = |values: &mut dyn Iterator<Item = f64>| {
        values
            .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), it| (low.min(it), high.max(it)))
    };
    let (_, last) = bounds(&mut points.iter().map(|point| point.0));
    let (low, high) = bounds(&mut points.iter().map(|point| point.1));
    draw(|area| {
        let mut chart = ChartBuilder::on(area);
        chart.caption(title, (FONT, 16)).margin(8).margin_right(24);
        chart.x_label_area_size(36).y_label_area_size(56);
        let steps = 0.0..last.max(1.0);
        let line = || LineSeries::new(points.iter().copied(), STUDENT.stroke_width(2));
        if logarithmic && low > 0.0 && high / low > LOGARITHMIC {
            let mut chart = chart.build_cartesian_2d(steps, (low * 0.9..high * 1.1).log_scale())?;
            mesh(&mut chart, "steps", unit)?;
            chart.draw_series(line())?;
        } else {
            let margin = (high - low).max(1e-9) * 0.1;
            let mut chart = chart.build_cartesian_2d(steps, low - margin..high + margin)?;
            mesh(&mut chart, "steps", unit)?;
            chart.draw_series(line())?;
        }
        Ok(())
    })
}

/// Time of an evaluation by image and batch size, of both.
///
/// # Errors
/// What the library says.
pub(super) fn speed(comparison: &Comparison) -> Result<String, String> {
    let most = comparison.speed.iter().flat_map(|it| [it.teacher_ms, it.student_ms]);
    let most = most.fold(0.0, f64::max);
    let count = comparison.speed.len() as f64;
    draw(|area| {
        let mut chart = ChartBuilder::on(area)
            .caption("Time of an evaluation, by image", (FONT, 16))
            .margin(8)
            .margin_right(24)
            .x_label_area_size(36)
            .y_label_area_size(56)
            .build_cartesian_2d(0.0..count, 0.0..most * 1.4)?;
        let name = |at: &f64| {
            let speed = comparison.speed.get(at.floor() as usize);
            speed
                .filter(|_| (at.fract() - 0.5).abs() < 0.01)
                .map(|it| it.batch.to_string())
                .unwrap_or_default()
        };
        chart
            .configure_mesh()
            .disable_x_mesh()
            .light_line_style(TRANSPARENT)
            .x_labels(2 * comparison.speed.len() + 1)
            .x_label_formatter(&name)
            .x_desc("batch size")
            .y_desc("ms")
            .label_style((FONT, 12))
            .draw()?;
        let bars = |left: f64, value: fn(&super::comparison::Speed) -> f64, colour: RGBColor| {
            let speeds = comparison.speed.iter().enumerate();
            let bars: Vec<_> = speeds
                .map(|(i, speed)| {
                    let left = i as f64 + left;
                    Rectangle::new([(left, 0.0), (left + 0.3, value(speed))], colour.filled())
                })
                .collect();
            bars
        };
        chart
            .draw_series(bars(0.2, |it| it.teacher_ms, TEACHER))?
            .label("teacher")
            .legend(|(x, y)| Rectangle::new([(x, y - 4), (x + 12, y + 4)], TEACHER.filled()));
        chart
            .draw_series(bars(0.5, |it| it.student_ms, STUDENT))?
            .label("student")
            .legend(|(x, y)| Rectangle::new([(x, y - 4), (x + 12, y + 4)], STUDENT.filled()));
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperRight)
            .label_font((FONT, 12))
            .border_style(TRANSPARENT)
            .draw()?;
        Ok(())
    })
}

type Chart<'a, 'b, X, Y> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<X, Y>>;
type Outcome<'a> = Result<(), DrawingAreaErrorKind<<SVGBackend<'a> as DrawingBackend>::ErrorType>>;

fn mesh<'b, X, Y>(chart: &mut Chart<'_, 'b, X, Y>, x: &str, y: &str) -> Outcome<'b>
where
    X: Ranged<ValueType = f64> + ValueFormatter<f64>,
    Y: Ranged<ValueType = f64> + ValueFormatter<f64>,
{
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .x_labels(6)
        .x_label_formatter(&|step| format!("{step:.0}"))
        .y_labels(6)
        .x_desc(x)
        .y_desc(y)
        .label_style((FONT, 12))
        .draw()
}

fn draw(
    with: impl for<'a> FnOnce(&DrawingArea<SVGBackend<'a>, plotters::coord::Shift>) -> Outcome<'a>,
) -> Result<String, String> {
    let mut text = String::new();
    {
        let area = SVGBackend::with_string(&mut text, SIZE).into_drawing_area();
        let drawn = area.fill(&WHITE).and_then(|()| with(&area)).and_then(|()| area.present());
        drawn.map_err(|error| format!("a plot could not be drawn: {error}"))?;
    }
    Ok(text)
}
