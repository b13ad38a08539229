//! Where the time of a step goes, as tables.

use calor_train::StepProfile;

use crate::output::{Align, Table, count, number, seconds};

/// The phases, the operations, and how much is launched.
pub fn show(profile: &StepProfile) -> String {
    let phases = &profile.phases;
    let whole_s = phases.forward_s + phases.backward_s + phases.optimizer_s;
    let mut table = Table::new(&[
        ("phase", Align::Left),
        ("time", Align::Right),
        ("share", Align::Right),
    ]);
    for (name, phase_s) in [
        ("forward", phases.forward_s),
        ("backward", phases.backward_s),
        ("clipping and update", phases.optimizer_s),
    ] {
        table.row([
            name.to_owned(),
            milliseconds(phase_s),
            percent(phase_s / whole_s),
        ]);
    }
    let mut text = format!("\n{}\n{}", table.render(), operations(profile).render());
    text.push_str(&format!(
        "\n{} calls of these operations a step",
        count(profile.operation_calls)
    ));
    if let Some(launches) = profile.kernel_launches.value() {
        text.push_str(&format!(", {} kernel launches", number(launches)));
    }
    text.push_str(&format!(
        "; with the device waited for around each it took {}\n",
        seconds(profile.step_s)
    ));
    text
}

fn operations(profile: &StepProfile) -> Table {
    let mut table = Table::new(&[
        ("operation", Align::Left),
        ("calls", Align::Right),
        ("forward", Align::Right),
        ("backward", Align::Right),
        ("share", Align::Right),
    ]);
    for operation in &profile.operations {
        table.row([
            operation.name.to_owned(),
            count(operation.forward_calls + operation.backward_calls),
            milliseconds(operation.forward_s),
            match operation.backward_calls {
                0 => String::new(),
                _ => milliseconds(operation.backward_s),
            },
            percent(operation.share),
        ]);
    }
    let other = &profile.other;
    let update = other.optimizer_s / profile.step_s;
    table.row([
        "other operations".to_owned(),
        String::new(),
        milliseconds(other.forward_s),
        milliseconds(other.backward_s),
        percent(other.share - update),
    ]);
    table.row([
        "… of clipping and update".to_owned(),
        String::new(),
        milliseconds(other.optimizer_s),
        String::new(),
        percent(update),
    ]);
    table
}

fn milliseconds(elapsed_s: f64) -> String {
    format!("{:.2} ms", 1e3 * elapsed_s)
}

fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}

#[cfg(test)]
mod tests {
    use calor_meter::Quantity;
    use calor_train::{OperationProfile, OtherTimes, PhaseTimes};

    use super::*;

    #[test]
    fn shares_add_up_and_launches_are_named() {
        let profile = StepProfile {
            steps: 1,
            phases: PhaseTimes {
                forward_s: 0.25,
                backward_s: 0.5,
                optimizer_s: 0.25,
            },
            step_s: 2.0,
            operations: vec![OperationProfile {
                name: "lora_linear",
                forward_calls: 3,
                forward_s: 0.4,
                backward_calls: 2,
                backward_s: 0.6,
                share: 0.5,
            }],
            other: OtherTimes {
                forward_s: 0.2,
                backward_s: 0.4,
                optimizer_s: 0.4,
                share: 0.5,
            },
            operation_calls: 5,
            kernel_launches: Quantity::measured(1234.0, "test"),
        };
        let text = show(&profile);
        for line in [
            "  backward             500.00 ms  50.0 %",
            "  lora_linear                   5  400.00 ms  600.00 ms  50.0 %",
            "  other operations                 200.00 ms  400.00 ms  30.0 %",
            "  … of clipping and update         400.00 ms             20.0 %",
            "5 calls of these operations a step, 1,234 kernel launches; with the device waited for around each it took 2.0 s",
        ] {
            assert!(text.contains(line), "{line}\n{text}");
        }
    }
}
