use proptest::prelude::*;

use super::*;
use crate::labels::TaskLabels;
use crate::options::{Overlength, SequenceOptions};
use crate::plan::{BatchPlan, Order, PlanOptions};
use crate::testing::{any_patient, tokenizer, wordpiece, write_cohort};

fn prepared(patients: &[calor_records::Patient]) -> (tempfile::TempDir, Prepared) {
    let folder = tempfile::tempdir().unwrap();
    let (cohort, labels) = write_cohort(folder.path(), patients, 1, &[2_000, 5_000]);
    let prepared = crate::prepare(
        &cohort,
        &TaskLabels::binary("task", &labels).unwrap(),
        &tokenizer(&wordpiece(), None),
        &SequenceOptions {
            max_tokens: 64,
            overlength: Overlength::DropOldestEvents,
            ..Default::default()
        },
        None,
        &folder.path().join("cache"),
        &|_| {},
    )
    .unwrap();
    (folder, prepared)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn batches_hold_every_sample_whole_and_padding_holds_nothing(
        mut patients in prop::collection::vec(any_patient(), 4..24),
        packing: bool,
        global_batch in 1usize..16,
        micro_batch in 1usize..5,
        multiple in 0usize..17,
    ) {
        for patient in &mut patients {
            patient.events.insert(0, crate::testing::event(None, "seen", None));
        }
        let (_folder, prepared) = prepared(&patients);
        let plan = BatchPlan::new(&prepared, &prepared.all(), PlanOptions {
            order: Order::Shuffled { seed: 3, epoch: 1 },
            global_batch,
            micro_batch,
            max_tokens: 64,
            packing,
        }).unwrap();
        let pad_id = 77;
        let mut seen = Vec::new();
        let mut tokens = 0;
        for index in 0..plan.steps() {
            let step = plan.step(index);
            let mut supervised = 0;
            for micro in &step.micro_batches {
                let batch = collate(&prepared, micro, pad_id, multiple);
                prop_assert_eq!(batch.rows, micro.rows.len());
                prop_assert_eq!(batch.padded_token_count, batch.rows * batch.seq);
                prop_assert_eq!(batch.seq % multiple.max(1), 0);
                for array in [&batch.input_ids, &batch.positions, &batch.segments] {
                    prop_assert_eq!(array.len(), batch.padded_token_count);
                }
                prop_assert_eq!(batch.spans.len(), batch.samples.len());
                prop_assert_eq!(batch.spans.len(), batch.targets.len());
                let mut covered = vec![false; batch.padded_token_count];
                let mut segment_of_row = vec![0; batch.rows];
                for (place, span) in batch.spans.iter().enumerate() {
                    let sample = prepared.sample(batch.samples[place] as usize);
                    prop_assert_eq!(&batch.targets[place], &sample.targets);
                    prop_assert!(span.start + span.length <= batch.seq);
                    segment_of_row[span.row] += 1;
                    let first = span.row * batch.seq + span.start;
                    prop_assert_eq!(span.length, sample.tokens.len());
                    for (offset, &token) in sample.tokens.iter().enumerate() {
                        let at = first + offset;
                        prop_assert!(!covered[at]);
                        covered[at] = true;
                        prop_assert_eq!(batch.input_ids[at], token as i32);
                        prop_assert_eq!(batch.positions[at], offset as i32);
                        prop_assert_eq!(batch.segments[at], segment_of_row[span.row]);
                    }
                    seen.push(batch.samples[place]);
                }
                for (at, covered) in covered.iter().enumerate() {
                    if !covered {
                        prop_assert_eq!(batch.input_ids[at], pad_id as i32);
                        prop_assert_eq!(batch.positions[at], 0);
                        prop_assert_eq!(batch.segments[at], 0);
                    }
                }
                prop_assert_eq!(batch.token_count, covered.iter().filter(|c| **c).count());
                tokens += batch.token_count;
                supervised += batch.supervised_count;
            }
            prop_assert_eq!(supervised, step.supervised_count(&prepared));
        }
        prop_assert_eq!(tokens as u64, prepared.report().tokens);
        prop_assert_eq!(tokens as u64, plan.tokens());
        seen.sort_unstable();
        prop_assert_eq!(seen, (0..prepared.len() as u64).collect::<Vec<_>>());
    }
}

#[test]
fn a_row_restarts_positions_and_counts_segments() {
    let patients: Vec<_> = (0..4)
        .map(|subject_id| calor_records::Patient {
            subject_id,
            events: vec![crate::testing::event(None, "old", None)],
        })
        .collect();
    let (_folder, prepared) = prepared(&patients);
    // [CLS] p ##a ##t ##i ##e ##n ##t , old . [SEP]
    assert_eq!(prepared.length(0), 12);
    let micro = MicroBatch {
        rows: vec![vec![0, 3], vec![5]],
    };
    let batch = collate(&prepared, &micro, 0, 32);
    assert_eq!((batch.rows, batch.seq), (2, 32));
    assert_eq!(batch.positions[11..14], [11, 0, 1]);
    assert_eq!(batch.segments[11..14], [1, 2, 2]);
    assert_eq!(batch.segments[24..32], [0; 8]);
    assert_eq!(
        batch.spans[1],
        Span {
            row: 0,
            start: 12,
            length: 12
        }
    );
    assert_eq!(
        batch.spans[2],
        Span {
            row: 1,
            start: 0,
            length: 12
        }
    );
    assert_eq!(batch.samples, [0, 3, 5]);
    assert_eq!((batch.token_count, batch.padded_token_count), (36, 64));
    assert_eq!(batch.supervised_count, 3);
}
