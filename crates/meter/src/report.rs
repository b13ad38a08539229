//! The part of `report.json` that holds what was measured.

use serde::{Deserialize, Serialize};

use crate::Quantity;
use crate::energy::{Component, ComponentReading, Purpose};
use crate::memory::MemoryReport;
use crate::throughput::{Counts, ThroughputReport};

/// Everything the meter knows at the end of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MeterReport {
    pub throughput: ThroughputReport,
    pub utilisation: UtilisationReport,
    pub memory: MemoryReport,
    pub energy: EnergyReport,
}

/// Model FLOPs utilisation of training.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct UtilisationReport {
    /// Operations that the model needed.
    pub model_flops: Quantity,
    /// Useful operations a second over the device's peak.
    pub mfu: Quantity,
    /// The same with recomputed operations counted as well.
    pub hfu: Quantity,
}

/// Energy of a run. Joules are of the counted components alone: not of the power supply, the
/// cooling, the network, or a component that is not listed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EnergyReport {
    pub idle: IdleBaseline,
    pub warm_up: ActivityEnergy,
    pub training: ActivityEnergy,
    pub evaluation: ActivityEnergy,
    pub grid_intensity_g_per_kwh: Quantity,
    /// What a reader has to know about the numbers.
    pub notes: Vec<String>,
}

/// The machine at rest before the run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct IdleBaseline {
    pub window_s: Quantity,
    /// All components together.
    pub watts: Quantity,
}

/// Energy of the windows of one purpose.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ActivityEnergy {
    pub elapsed_s: f64,
    pub windows: u64,
    pub components: Vec<ComponentEnergy>,
    /// Joules while the windows were open.
    pub gross_j: Quantity,
    /// Gross joules less the idle watts times the windows' seconds. Where the baseline was noisy
    /// and the work small, it can fall below zero; it is not rounded up.
    pub net_j: Quantity,
    pub mean_w: Quantity,
    /// A real token, padding excluded.
    pub gross_j_per_token: Quantity,
    pub net_j_per_token: Quantity,
    pub gross_j_per_sequence: Quantity,
    pub net_j_per_sequence: Quantity,
    /// Gross energy times the grid's intensity.
    pub emissions_g_co2e: Quantity,
}

/// Energy of one component.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ComponentEnergy {
    pub component: Component,
    pub source: String,
    pub idle_w: Quantity,
    pub gross_j: Quantity,
    pub net_j: Quantity,
}

const JOULES_PER_KWH: f64 = 3.6e6;

impl ActivityEnergy {
    pub(crate) fn new(
        purpose: Purpose,
        readings: &[ComponentReading],
        counts: Counts,
        elapsed_s: f64,
        grid_intensity: &Quantity,
    ) -> ActivityEnergy {
        let windows = readings
            .iter()
            .map(|reading| reading.windows[purpose.index()])
            .max()
            .unwrap_or(0);
        if windows == 0 {
            return ActivityEnergy::nothing(purpose);
        }
        let components: Vec<ComponentEnergy> = readings
            .iter()
            .map(|reading| {
                let gross_j = reading.gross_j[purpose.index()].clone();
                ComponentEnergy {
                    component: reading.component,
                    source: reading.source.clone(),
                    idle_w: reading.idle_w.clone(),
                    net_j: net(&gross_j, &reading.idle_w, elapsed_s),
                    gross_j,
                }
            })
            .collect();
        let total = |part: fn(&ComponentEnergy) -> &Quantity| {
            Quantity::sum(
                components
                    .iter()
                    .map(|component| (component.component.name(), part(component))),
            )
        };
        let gross_j = total(|component| &component.gross_j);
        let net_j = total(|component| &component.net_j);
        // The reason for a missing total is given once; what follows from it refers to it.
        let follows = |quantity: Quantity, of: &Quantity, name: &str| match of.value() {
            Some(_) => quantity,
            None => Quantity::unavailable(format!("{name} is unavailable")),
        };
        let per = |energy_j: &Quantity, name: &str, count: u64, unit: &str| {
            follows(energy_j.per(count, unit), energy_j, name)
        };
        let mean_w = gross_j.map(&format!("over {elapsed_s:.3} s"), |joules| {
            joules / elapsed_s
        });
        ActivityEnergy {
            elapsed_s,
            windows,
            mean_w: follows(mean_w, &gross_j, "gross_j"),
            gross_j_per_token: per(&gross_j, "gross_j", counts.tokens, "tokens"),
            net_j_per_token: per(&net_j, "net_j", counts.tokens, "tokens"),
            gross_j_per_sequence: per(&gross_j, "gross_j", counts.sequences, "sequences"),
            net_j_per_sequence: per(&net_j, "net_j", counts.sequences, "sequences"),
            emissions_g_co2e: follows(emissions(&gross_j, grid_intensity), &gross_j, "gross_j"),
            components,
            gross_j,
            net_j,
        }
    }

    /// The energy of a purpose that no window was opened for.
    fn nothing(purpose: Purpose) -> ActivityEnergy {
        let none = || Quantity::unavailable(format!("no {} was measured", purpose.name()));
        ActivityEnergy {
            elapsed_s: 0.0,
            windows: 0,
            components: Vec::new(),
            gross_j: none(),
            net_j: none(),
            mean_w: none(),
            gross_j_per_token: none(),
            net_j_per_token: none(),
            gross_j_per_sequence: none(),
            net_j_per_sequence: none(),
            emissions_g_co2e: none(),
        }
    }
}

fn net(gross_j: &Quantity, idle_w: &Quantity, elapsed_s: f64) -> Quantity {
    match idle_w.value() {
        None if gross_j.value().is_some() => {
            Quantity::unavailable(format!("no idle baseline: {}", idle_w.source()))
        }
        None | Some(0.0) => gross_j.clone(),
        Some(watts) => gross_j.map(
            &format!("less {watts:.3} W at rest for {elapsed_s:.3} s"),
            |joules| joules - watts * elapsed_s,
        ),
    }
}

fn emissions(gross_j: &Quantity, grid_intensity: &Quantity) -> Quantity {
    let (Some(joules), Some(intensity)) = (gross_j.value(), grid_intensity.value()) else {
        let missing = if gross_j.value().is_none() {
            gross_j
        } else {
            grid_intensity
        };
        return missing.clone();
    };
    // An intensity is a yearly or hourly mean of a grid: the product is a model, whatever the
    // joules are.
    Quantity::modelled(
        joules / JOULES_PER_KWH * intensity,
        format!(
            "gross energy ({}) × stated grid intensity",
            gross_j.status()
        ),
        [("gross_j", joules), ("grid_intensity_g_per_kwh", intensity)],
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reading(component: Component, gross_j: Quantity, idle_w: Quantity) -> ComponentReading {
        ComponentReading {
            component,
            source: "fake".to_owned(),
            idle_w,
            gross_j: [
                Quantity::unavailable("no warm_up was measured"),
                gross_j,
                Quantity::unavailable("no evaluation was measured"),
            ],
            windows: [0, 1, 0],
        }
    }

    fn training(readings: &[ComponentReading], grid: &Quantity) -> ActivityEnergy {
        let counts = Counts {
            sequences: 10,
            padded_tokens: 2_000,
            tokens: 1_000,
            supervised: 10,
        };
        ActivityEnergy::new(Purpose::Training, readings, counts, 4.0, grid)
    }

    #[test]
    fn net_takes_the_idle_watts_of_each_component_off() {
        let energy = training(
            &[
                reading(
                    Component::Host,
                    Quantity::measured(200.0, "RAPL"),
                    Quantity::measured(20.0, "RAPL"),
                ),
                reading(
                    Component::Device,
                    Quantity::measured(1_000.0, "NVML"),
                    Quantity::measured(70.0, "NVML"),
                ),
            ],
            &Quantity::measured(90.0, "recipe"),
        );
        assert_eq!(energy.gross_j.value(), Some(1_200.0));
        assert_eq!(energy.net_j.value(), Some(1_200.0 - 4.0 * 90.0));
        assert_eq!(energy.mean_w.value(), Some(300.0));
        assert_eq!(energy.gross_j_per_token.value(), Some(1.2));
        assert_eq!(energy.net_j_per_token.value(), Some(0.84));
        assert_eq!(energy.gross_j_per_sequence.value(), Some(120.0));
        assert_eq!(
            energy.emissions_g_co2e.value(),
            Some(1_200.0 / 3.6e6 * 90.0)
        );
        assert!(energy.emissions_g_co2e.is_modelled());
        assert_eq!(energy.gross_j.status(), "measured");
    }

    #[test]
    fn a_component_that_cannot_be_read_leaves_the_total_open_and_the_rest_known() {
        let energy = training(
            &[
                reading(
                    Component::Host,
                    Quantity::modelled(200.0, "model", [("cpu_time_s", 20.0)]),
                    Quantity::modelled(0.0, "by definition", []),
                ),
                reading(
                    Component::Device,
                    Quantity::unavailable("no driver"),
                    Quantity::unavailable("no driver"),
                ),
            ],
            &Quantity::unavailable("no grid intensity was given"),
        );
        assert_eq!(energy.components[0].net_j.value(), Some(200.0));
        assert!(energy.components[0].net_j.is_modelled());
        assert_eq!(energy.gross_j, Quantity::unavailable("device: no driver"));
        assert_eq!(energy.net_j, Quantity::unavailable("device: no driver"));
        for quantity in [
            &energy.mean_w,
            &energy.gross_j_per_token,
            &energy.gross_j_per_sequence,
            &energy.emissions_g_co2e,
        ] {
            assert_eq!(*quantity, Quantity::unavailable("gross_j is unavailable"));
        }
    }

    #[test]
    fn what_had_no_window_has_no_components_and_no_zero() {
        let host = reading(
            Component::Host,
            Quantity::measured(200.0, "RAPL"),
            Quantity::measured(20.0, "RAPL"),
        );
        let grid = Quantity::measured(90.0, "recipe");
        let counts = Counts::default();
        let energy = ActivityEnergy::new(Purpose::Evaluation, &[host], counts, 0.0, &grid);
        let none = Quantity::unavailable("no evaluation was measured");
        assert_eq!((energy.windows, energy.components.len()), (0, 0));
        assert_eq!(energy.gross_j, none);
        assert_eq!(energy.emissions_g_co2e, none);
    }

    #[test]
    fn without_a_baseline_or_a_grid_there_is_gross_energy_alone() {
        let energy = training(
            &[reading(
                Component::Host,
                Quantity::measured(200.0, "RAPL"),
                Quantity::unavailable("the idle baseline was not measured"),
            )],
            &Quantity::unavailable("no grid intensity was given"),
        );
        assert_eq!(energy.gross_j.value(), Some(200.0));
        assert!(
            energy
                .net_j
                .source()
                .contains("idle baseline was not measured")
        );
        assert!(energy.net_j.value().is_none());
        assert_eq!(
            energy.emissions_g_co2e,
            Quantity::unavailable("no grid intensity was given")
        );
    }
}
