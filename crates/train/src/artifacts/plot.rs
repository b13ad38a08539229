//! Charts as inline SVG: no script, colours from the page's style sheet.

use std::fmt::Write;

const WIDTH: f64 = 560.0;
const RIGHT: f64 = 14.0;
const TOP: f64 = 12.0;
const BOTTOM: f64 = 42.0;

/// How a series is drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Mark {
    /// A line through the points.
    Line,
    /// A thin, pale line, for raw values behind a smoothed one.
    Pale,
    /// A line with a dot at each point.
    Dots,
    /// Dots alone.
    Scatter,
    /// A dashed line: what chance or perfection would give.
    Reference,
}

/// Points with a name.
pub(super) struct Series {
    pub name: String,
    pub points: Vec<[f64; 2]>,
    pub mark: Mark,
    /// Number of the colour, from 0.
    pub colour: usize,
}

/// A chart with two axes.
pub(super) struct Chart {
    /// What a screen reader says.
    pub title: String,
    pub x_label: String,
    pub y_label: String,
    pub series: Vec<Series>,
    /// Limits of the axes; what is missing follows from the points.
    pub x_range: Option<[f64; 2]>,
    pub y_range: Option<[f64; 2]>,
    /// Height in pixels; the width is 560.
    pub height: f64,
}

impl Chart {
    /// The chart as an `<svg>` element.
    pub fn svg(&self) -> String {
        let y = Axis::new(self.y_range, self.values(1), self.height - BOTTOM, TOP);
        let y_ticks: Vec<String> = y.ticks.iter().map(|tick| label(*tick, y.step)).collect();
        let left = left_margin(&y_ticks);
        let x = Axis::new(self.x_range, self.values(0), left, WIDTH - RIGHT);
        let mut svg = format!(
            "<svg viewBox=\"0 0 {WIDTH} {}\" role=\"img\" aria-label=\"{}\" class=\"chart\">",
            self.height,
            escape(&self.title)
        );
        for (tick, text) in y.ticks.iter().zip(&y_ticks) {
            let at = y.place(*tick);
            let _ = write!(
                svg,
                "<line class=\"grid\" x1=\"{left}\" x2=\"{}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/>",
                WIDTH - RIGHT
            );
            let _ = write!(
                svg,
                "<text class=\"tick\" text-anchor=\"end\" x=\"{}\" y=\"{:.1}\">{}</text>",
                left - 8.0,
                at + 4.0,
                escape(text)
            );
        }
        let floor = self.height - BOTTOM;
        for tick in &x.ticks {
            let at = x.place(*tick);
            let _ = write!(
                svg,
                "<line class=\"grid\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{TOP}\" y2=\"{floor}\"/>"
            );
            let _ = write!(
                svg,
                "<text class=\"tick\" text-anchor=\"middle\" x=\"{at:.1}\" y=\"{}\">{}</text>",
                floor + 17.0,
                label(*tick, x.step)
            );
        }
        let _ = write!(
            svg,
            "<line class=\"axis\" x1=\"{left}\" x2=\"{}\" y1=\"{floor}\" y2=\"{floor}\"/>",
            WIDTH - RIGHT
        );
        for series in &self.series {
            draw(&mut svg, series, &x, &y);
        }
        let middle = (left + WIDTH - RIGHT) / 2.0;
        let _ = write!(
            svg,
            "<text class=\"label\" text-anchor=\"middle\" x=\"{middle}\" y=\"{}\">{}</text>",
            self.height - 6.0,
            escape(&self.x_label)
        );
        let centre = (TOP + floor) / 2.0;
        let _ = write!(
            svg,
            "<text class=\"label\" text-anchor=\"middle\" transform=\"translate(13 {centre}) rotate(-90)\">{}</text>",
            escape(&self.y_label)
        );
        svg.push_str("</svg>");
        svg
    }

    /// Name and colour of each named series, for a legend in HTML.
    pub fn legend(&self) -> Vec<(String, String)> {
        let named = self.series.iter().filter(|series| !series.name.is_empty());
        named
            .map(|series| (series.name.clone(), class(series)))
            .collect()
    }

    fn values(&self, axis: usize) -> impl Iterator<Item = f64> + '_ {
        self.series
            .iter()
            .flat_map(move |series| series.points.iter().map(move |point| point[axis]))
            .filter(|value| value.is_finite())
    }
}

fn class(series: &Series) -> String {
    match series.mark {
        Mark::Reference => "reference".to_owned(),
        Mark::Pale => format!("pale c{}", series.colour % 6),
        _ => format!("c{}", series.colour % 6),
    }
}

fn draw(svg: &mut String, series: &Series, x: &Axis, y: &Axis) {
    let class = class(series);
    if series.mark != Mark::Scatter {
        // A value that is not finite breaks the line.
        for run in series
            .points
            .split(|point| !(point[0].is_finite() && point[1].is_finite()))
        {
            if run.len() > 1 {
                let _ = write!(svg, "<polyline class=\"line {class}\" points=\"");
                for point in run {
                    let _ = write!(svg, "{:.1},{:.1} ", x.place(point[0]), y.place(point[1]));
                }
                svg.push_str("\"/>");
            }
        }
    }
    if matches!(series.mark, Mark::Dots | Mark::Scatter) {
        let radius = if series.mark == Mark::Dots { 3.5 } else { 2.0 };
        for point in series
            .points
            .iter()
            .filter(|point| point[0].is_finite() && point[1].is_finite())
        {
            let _ = write!(
                svg,
                "<circle class=\"dot {class}\" cx=\"{:.1}\" cy=\"{:.1}\" r=\"{radius}\"/>",
                x.place(point[0]),
                y.place(point[1])
            );
        }
    }
}

struct Axis {
    low: f64,
    high: f64,
    from: f64,
    to: f64,
    step: f64,
    ticks: Vec<f64>,
}

impl Axis {
    fn new(range: Option<[f64; 2]>, values: impl Iterator<Item = f64>, from: f64, to: f64) -> Axis {
        let (low, high) = match range {
            Some([low, high]) => (low, high),
            None => values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| {
                (low.min(value), high.max(value))
            }),
        };
        let (mut low, mut high) = if low <= high { (low, high) } else { (0.0, 1.0) };
        if high - low < 1e-12 * high.abs().max(1.0) {
            let half = if low == 0.0 { 0.5 } else { low.abs() * 0.1 };
            (low, high) = (low - half, high + half);
        }
        let step = nice_step((high - low) / 5.0);
        if range.is_none() {
            low = (low / step).floor() * step;
            high = (high / step).ceil() * step;
        }
        let first = (low / step - 1e-9).ceil() as i64;
        let last = (high / step + 1e-9).floor() as i64;
        let ticks = (first..=last).map(|index| index as f64 * step).collect();
        Axis {
            low,
            high,
            from,
            to,
            step,
            ticks,
        }
    }

    fn place(&self, value: f64) -> f64 {
        self.from
            + (value.clamp(self.low, self.high) - self.low) / (self.high - self.low)
                * (self.to - self.from)
    }
}

/// Room for the label of the y axis and the widest of its ticks.
fn left_margin(ticks: &[String]) -> f64 {
    const LABEL: f64 = 32.0;
    const CHARACTER: f64 = 7.0;
    let widest = ticks.iter().map(|tick| tick.chars().count()).max();
    (LABEL + CHARACTER * widest.unwrap_or(0) as f64).max(60.0)
}

/// The smallest of 1, 2 and 5 times a power of ten that is at least `rough`.
fn nice_step(rough: f64) -> f64 {
    let power = 10f64.powf(rough.log10().floor());
    let factor = [1.0, 2.0, 5.0, 10.0]
        .into_iter()
        .find(|factor| factor * power >= rough * (1.0 - 1e-9))
        .unwrap_or(10.0);
    factor * power
}

fn label(value: f64, step: f64) -> String {
    let value = if value.abs() < step * 1e-6 {
        0.0
    } else {
        value
    };
    if value.abs() >= 1e6 || (value != 0.0 && step < 1e-4) {
        return format!("{value:.0e}");
    }
    let decimals = (-step.log10().floor()).max(0.0) as usize;
    format!("{value:.decimals$}")
}

/// Text for HTML and for attributes in double quotes.
pub(super) fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

/// A running mean in which the last `span` values count most (exponential, corrected for
/// its start).
pub(super) fn smooth(points: &[[f64; 2]], span: f64) -> Vec<[f64; 2]> {
    let keep = 1.0 - 1.0 / span.max(1.0);
    let (mut sum, mut weight) = (0.0, 0.0);
    let mut smoothed = Vec::with_capacity(points.len());
    for point in points {
        if point[1].is_finite() {
            sum = sum * keep + point[1];
            weight = weight * keep + 1.0;
            smoothed.push([point[0], sum / weight]);
        }
    }
    smoothed
}

/// At most `count` points: every so many, and the last.
pub(super) fn thin(points: &[[f64; 2]], count: usize) -> Vec<[f64; 2]> {
    let every = points.len().div_ceil(count.max(1)).max(1);
    let mut kept: Vec<[f64; 2]> = points.iter().copied().step_by(every).collect();
    if let (Some(last), Some(end)) = (points.last(), kept.last())
        && end != last
    {
        kept.push(*last);
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_have_round_ticks_that_cover_the_points() {
        let axis = Axis::new(None, [0.13, 0.87].into_iter(), 0.0, 100.0);
        assert_eq!((axis.low, axis.high, axis.step), (0.0, 1.0, 0.2));
        assert_eq!(axis.ticks.len(), 6);
        assert!((axis.place(0.5) - 50.0).abs() < 1e-9);
        let axis = Axis::new(None, [1234.0].into_iter(), 0.0, 1.0);
        assert!(axis.low < 1234.0 && axis.high > 1234.0);
        let axis = Axis::new(None, std::iter::empty(), 0.0, 1.0);
        assert_eq!((axis.low, axis.high), (0.0, 1.0));
    }

    #[test]
    fn ticks_are_labelled_with_the_digits_they_need() {
        assert_eq!(label(0.2 * 3.0, 0.2), "0.6");
        assert_eq!(label(-1e-18, 0.2), "0.0");
        assert_eq!(label(300.0, 100.0), "300");
        assert_eq!(label(2e-5, 1e-5), "2e-5");
    }

    #[test]
    fn a_chart_is_escaped_and_skips_what_is_not_finite() {
        let series = Series {
            name: "a".into(),
            points: vec![[0.0, 1.0], [1.0, f64::NAN], [2.0, 1.0], [3.0, 2.0]],
            mark: Mark::Line,
            colour: 0,
        };
        let chart = Chart {
            title: "a < b".into(),
            x_label: "\"x\"".into(),
            y_label: "y".into(),
            series: vec![series],
            x_range: None,
            y_range: None,
            height: 300.0,
        };
        let svg = chart.svg();
        assert!(svg.contains("a &lt; b") && svg.contains("&quot;x&quot;"));
        assert!(!svg.contains("NaN"), "{svg}");
        assert_eq!(svg.matches("<polyline").count(), 1);
    }

    #[test]
    fn smoothing_starts_at_the_first_value_and_thinning_keeps_the_last() {
        let points: Vec<[f64; 2]> = (0..101)
            .map(|index| [f64::from(index), if index == 0 { 4.0 } else { 2.0 }])
            .collect();
        let smoothed = smooth(&points, 10.0);
        assert_eq!(smoothed[0][1], 4.0);
        assert!((smoothed[100][1] - 2.0).abs() < 0.01);
        let thinned = thin(&points, 10);
        assert!(thinned.len() <= 11);
        assert_eq!(thinned.last().unwrap()[0], 100.0);
    }
}
