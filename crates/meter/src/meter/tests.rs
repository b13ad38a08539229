use std::time::Duration;

use super::*;
use crate::Component;
use crate::clock::tests::ManualClock;
use crate::energy::tests::ConstantSource;
use crate::nvml::tests::FakeNvml;
use crate::rapl::tests::FakePowercap;

fn metered(watts: f64, options: EnergyOptions) -> (Meter, Arc<ManualClock>) {
    let clock = Arc::new(ManualClock::default());
    let source = ConstantSource::new(&clock, Component::Host, watts);
    let channels = vec![Channel::Source(Box::new(source))];
    let meter = Meter::with_channels(&options, channels, clock.clone()).unwrap();
    (meter, clock)
}

fn batch(tokens: u64) -> Counts {
    Counts {
        sequences: 2,
        padded_tokens: 2 * tokens,
        tokens,
        supervised: 2,
    }
}

#[test]
fn a_run_is_accounted_for_to_the_second_the_token_and_the_joule() {
    let options = EnergyOptions {
        grid_intensity_g_per_kwh: Some(150.0),
        ..EnergyOptions::default()
    };
    let (mut meter, clock) = metered(50.0, options);
    meter.set_flop_model(FlopModel {
        base_parameters: 1_000,
        adapter_parameters: 10,
        layers: 2,
        attention_width: 8,
        causal: false,
        window: None,
        base_trained: false,
        recomputed_share: 1.0,
    });
    meter.set_peak(PeakFlops::Stated {
        flops_per_s: 1e7,
        source: "test".to_owned(),
    });
    meter.measure_idle();
    meter.begin(Purpose::Training);
    for _ in 0..4 {
        meter.time(Phase::Data, || clock.advance(0.5));
        meter.time(Phase::Forward, || clock.advance(1.0));
        meter.time(Phase::Backward, || clock.advance(2.0));
        meter.time(Phase::Optimizer, || clock.advance(0.25));
        meter.count(Purpose::Training, batch(100), &[60, 40]);
        clock.advance(0.25);
        let step = meter.finish_step();
        assert_eq!(step.elapsed_s, 4.0);
        assert_eq!(step.backward_s, 2.0);
        assert_eq!(step.tokens_per_s, Some(25.0));
        assert_eq!(step.padded_tokens_per_s, Some(50.0));
    }
    meter.within(
        Purpose::Evaluation,
        || (),
        |meter| {
            meter.time(Phase::Evaluation, || clock.advance(2.0));
            meter.count(Purpose::Evaluation, batch(500), &[500]);
        },
    );
    clock.advance(1.0);
    meter.end();

    assert_eq!(meter.live().tokens_per_s, Some(25.0));
    let report = meter.report();
    let training = &report.throughput.training;
    assert_eq!(training.elapsed_s.value(), Some(17.0));
    assert_eq!(training.counts.tokens, 400);
    assert_eq!(training.tokens_per_s.value(), Some(400.0 / 17.0));
    assert_eq!(
        report.throughput.evaluation.tokens_per_s.value(),
        Some(250.0)
    );
    assert_eq!(report.throughput.other_s.value(), Some(2.0));
    assert_eq!(report.throughput.steps.median_s.value(), Some(4.0));

    // By hand: 4N + 6P a token, 12·S·d·L to both sides for segments of 60 and 40 tokens.
    let flops = 4.0 * (100.0 * 4_060.0 + 12.0 * 16.0 * (60.0 * 60.0 + 40.0 * 40.0));
    assert_eq!(report.utilisation.model_flops.value(), Some(flops));
    assert_eq!(report.utilisation.mfu.value(), Some(flops / 17.0 / 1e7));
    assert!(report.utilisation.hfu.value() > report.utilisation.mfu.value());
    assert!(report.utilisation.mfu.source().contains("stated peak"));
    assert!(
        report.utilisation.mfu.is_modelled(),
        "a formula is no counter"
    );

    let energy = &report.energy;
    assert_eq!(energy.idle.watts.value(), Some(50.0));
    assert_eq!(energy.training.gross_j.value(), Some(850.0));
    assert_eq!(energy.training.net_j.value(), Some(0.0));
    assert_eq!(
        energy.training.gross_j_per_token.value(),
        Some(850.0 / 400.0)
    );
    assert_eq!(energy.evaluation.gross_j.value(), Some(100.0));
    assert_eq!(energy.evaluation.gross_j_per_sequence.value(), Some(50.0));
    assert_eq!(
        energy.training.emissions_g_co2e.value(),
        Some(850.0 / 3.6e6 * 150.0)
    );
    assert_eq!(energy.warm_up.gross_j.value(), None);
}

#[test]
fn the_report_survives_json() {
    let (mut meter, clock) = metered(50.0, EnergyOptions::default());
    meter.begin(Purpose::Training);
    clock.advance(2.0);
    meter.count(Purpose::Training, batch(10), &[10]);
    meter.end();
    let report = meter.report();
    let json = serde_json::to_string(&report).unwrap();
    assert!(!json.contains("null"), "every number has a source: {json}");
    let back: MeterReport = serde_json::from_str(&json).unwrap();
    assert_eq!(back, report);
}

#[test]
fn without_a_model_or_a_peak_utilisation_says_what_is_missing() {
    let (mut meter, clock) = metered(50.0, EnergyOptions::default());
    let mfu = |meter: &Meter| meter.report().utilisation.mfu.source().to_owned();
    assert!(mfu(&meter).contains("operations were not given"));
    meter.set_flop_model(FlopModel {
        base_parameters: 10,
        adapter_parameters: 0,
        layers: 1,
        attention_width: 1,
        causal: true,
        window: None,
        base_trained: false,
        recomputed_share: 0.0,
    });
    assert!(mfu(&meter).contains("no training was measured"));
    meter.begin(Purpose::Training);
    meter.count(Purpose::Training, batch(10), &[10]);
    clock.advance(1.0);
    meter.end();
    assert!(mfu(&meter).contains("neither stated nor measured"));
    assert_eq!(
        meter.report().utilisation.model_flops.value(),
        Some(1_000.0)
    );
}

#[test]
fn an_evaluation_between_steps_is_not_in_a_steps_time() {
    let (mut meter, clock) = metered(1.0, EnergyOptions::default());
    meter.begin(Purpose::Training);
    clock.advance(1.0);
    meter.finish_step();
    meter.within(Purpose::Evaluation, || (), |_| clock.advance(100.0));
    clock.advance(1.5);
    assert_eq!(meter.finish_step().elapsed_s, 1.5);
}

#[test]
fn phases_of_warming_up_are_not_those_of_training() {
    let (mut meter, clock) = metered(1.0, EnergyOptions::default());
    meter.begin(Purpose::WarmUp);
    clock.advance(5.0);
    meter.add_phase(Phase::Forward, 5.0);
    meter.begin(Purpose::Training);
    clock.advance(2.0);
    meter.add_phase(Phase::Forward, 1.5);
    meter.finish_step();
    meter.end();
    let throughput = meter.report().throughput;
    let mut forward = throughput.phases.iter();
    let forward = forward.find(|part| part.phase == Phase::Forward).unwrap();
    assert_eq!(forward.total_s, 1.5);
    assert_eq!(throughput.other_s.value(), Some(0.5));
}

#[test]
fn the_device_is_synchronised_on_both_sides_of_the_work() {
    let (mut meter, _) = metered(1.0, EnergyOptions::default());
    let order = std::cell::RefCell::new(Vec::new());
    meter.within(
        Purpose::WarmUp,
        || order.borrow_mut().push("synchronise"),
        |_| order.borrow_mut().push("work"),
    );
    assert_eq!(*order.borrow(), ["synchronise", "work", "synchronise"]);
}

#[test]
fn rapl_and_nvml_together_make_the_total() {
    let fake = FakePowercap::new(&[("intel-rapl:0", "package-0")]);
    let nvml = Arc::new(FakeNvml::new(&["NVIDIA H100 80GB HBM3"]));
    *nvml.memory_used.lock().unwrap() = 7 << 30;
    let options = EnergyOptions {
        idle_window_s: 0.01,
        powercap_root: fake.root(),
        ..EnergyOptions::default()
    };
    let device = MeteredDevice::Adapter {
        name: "NVIDIA H100 80GB HBM3".to_owned(),
    };
    let given: Arc<dyn NvmlApi> = nvml.clone();
    let mut meter = Meter::open_with(&options, &device, || Ok(given)).unwrap();
    meter.measure_idle();
    meter.begin(Purpose::Training);
    fake.set("intel-rapl:0", 250_000);
    nvml.set_energy(0, Some(5_003_000));
    std::thread::sleep(Duration::from_millis(5));
    meter.count(Purpose::Training, batch(10), &[10]);
    meter.end();
    let report = meter.report();
    let training = &report.energy.training;
    assert_eq!(training.components.len(), 2);
    assert!((training.gross_j.value().unwrap() - 3.25).abs() < 1e-9);
    assert_eq!(training.gross_j.status(), "measured");
    assert_eq!(training.net_j.value(), training.gross_j.value());
    assert_eq!(
        report.memory.device_in_use_peak_bytes.value(),
        Some((7_u64 << 30) as f64)
    );
    assert!(report.energy.notes.is_empty());
}

#[test]
#[cfg(target_os = "linux")]
fn this_machine_without_counters_gets_a_modelled_energy_with_its_reason() {
    let options = EnergyOptions {
        idle_window_s: 0.0,
        powercap_root: "/nonexistent/powercap".into(),
        ..EnergyOptions::default()
    };
    let mut meter = Meter::open(&options, &MeteredDevice::Cpu).unwrap();
    meter.begin(Purpose::Training);
    let started = std::time::Instant::now();
    while started.elapsed() < Duration::from_millis(300) {
        std::hint::black_box(started.elapsed());
    }
    meter.end();
    let energy = meter.report().energy;
    assert!(energy.training.gross_j.is_modelled());
    // At least part of 0.3 s of one core at 10 W, and no more than a machine could spend.
    let joules = energy.training.gross_j.value().unwrap();
    assert!(joules > 0.1 && joules < 300.0, "{joules}");
    assert!(energy.notes[0].contains("/nonexistent/powercap"));
}
