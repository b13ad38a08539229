//! A chart with its title and legend.

use serde::Serialize;

use crate::artifacts::plot::{Chart, Series};

#[derive(Serialize)]
pub(super) struct DrawnChart {
    pub title: String,
    pub svg: String,
    pub legend: Vec<(String, String)>,
}

pub(super) fn drawn(
    title: &str,
    [x_label, y_label]: [&str; 2],
    series: Vec<Series>,
    x_range: Option<[f64; 2]>,
    y_range: Option<[f64; 2]>,
) -> DrawnChart {
    let chart = Chart {
        title: title.to_owned(),
        x_label: x_label.to_owned(),
        y_label: y_label.to_owned(),
        series,
        x_range,
        y_range,
        height: 330.0,
    };
    DrawnChart {
        title: title.to_owned(),
        svg: chart.svg(),
        legend: chart.legend(),
    }
}
