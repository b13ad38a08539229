//! From items to soft tokens: which token is whose, and what an encoder makes of what is missing.

use burn::tensor::Tensor;

use super::*;
use crate::Mode;

const CLOSE: f32 = 1e-5;

fn place(stream: usize, item: Option<usize>) -> Placement {
    Placement {
        stream,
        item,
        row: 0,
        start: 0,
        days_before: None,
        site: None,
    }
}

/// Soft tokens of placements of one stream, one vector a placement.
fn tokens(model: &Model, streams: Vec<Option<ItemTensors>>, placed: &[Placement]) -> Vec<Vec<f32>> {
    let soft = SoftInput {
        streams,
        placements: placed.to_vec(),
    };
    let tokens = model.soft_tokens(&soft, Mode::Infer).unwrap().unwrap();
    let numbers = values(tokens);
    numbers
        .chunks(numbers.len() / placed.len())
        .map(<[f32]>::to_vec)
        .collect()
}

/// The rows of every tensor in another order.
fn permuted(items: &ItemTensors, order: [i32; 3]) -> ItemTensors {
    let order = integers(order.to_vec(), [3]);
    fn rows<const D: usize>(tensor: &Tensor<D>, order: &Tensor<1, Int>) -> Tensor<D> {
        tensor.clone().select(0, order.clone())
    }
    match items {
        ItemTensors::Image(pixels) => ItemTensors::Image(rows(pixels, &order)),
        ItemTensors::Mel(frames) => ItemTensors::Mel(rows(frames, &order)),
        ItemTensors::Dense {
            values,
            present,
            lengths,
        } => {
            let places: Vec<i32> = order.to_data().try_to_vec().unwrap();
            ItemTensors::Dense {
                values: rows(values, &order),
                present: rows(present, &order),
                lengths: places
                    .iter()
                    .map(|&place| lengths[place as usize])
                    .collect(),
            }
        }
        ItemTensors::Series {
            time_days,
            variable,
            value,
            present,
        } => ItemTensors::Series {
            time_days: rows(time_days, &order),
            variable: variable.clone().select(0, order.clone()),
            value: rows(value, &order),
            present: rows(present, &order),
        },
        ItemTensors::Omics { values, present } => ItemTensors::Omics {
            values: rows(values, &order),
            present: rows(present, &order),
        },
        ItemTensors::Windows { values, present } => ItemTensors::Windows {
            values: rows(values, &order),
            present: rows(present, &order),
        },
    }
}

#[test]
fn permuting_items_permutes_their_tokens() {
    let model = moved("llama3", Pooling::Last).for_inference();
    for stream in [IMAGE, WAVE, LABS, GENES, VOICE] {
        let placed = [0, 1, 2].map(|item| place(stream, Some(item)));
        let straight = tokens(&model, items(), &placed);
        assert!(straight[0] != straight[1] && straight[1] != straight[2]);
        // Other places in the tensors, the same placements.
        let mut streams = items();
        streams[stream] = streams[stream]
            .as_ref()
            .map(|items| permuted(items, [2, 0, 1]));
        let turned = tokens(&model, streams, &placed);
        for (ours, theirs) in [(0, 2), (1, 0), (2, 1)] {
            let difference = largest_difference(&turned[ours], &straight[theirs]);
            assert!(difference < CLOSE, "stream {stream}: {difference}");
        }
        // Other placements of the same tensors, one of them twice.
        let placed = [2, 0, 2, 1].map(|item| place(stream, Some(item)));
        let again = tokens(&model, items(), &placed);
        for (ours, theirs) in [(0, 2), (1, 0), (2, 2), (3, 1)] {
            assert_eq!(again[ours], straight[theirs], "stream {stream}");
        }
    }
}

#[test]
fn tokens_come_stream_by_stream_in_the_order_of_their_placements() {
    let model = moved("llama3", Pooling::Last).for_inference();
    let placed = [
        place(GENES, Some(1)),
        place(IMAGE, Some(2)),
        place(GENES, None),
        place(IMAGE, Some(0)),
    ];
    let soft = SoftInput {
        streams: items(),
        placements: placed.to_vec(),
    };
    let all = values(model.soft_tokens(&soft, Mode::Infer).unwrap().unwrap());
    let expected: Vec<f32> = [1, 3, 0, 2]
        .into_iter()
        .flat_map(|index: usize| tokens(&model, items(), &placed[index..=index]).remove(0))
        .collect();
    assert!(largest_difference(&all, &expected) < CLOSE);
}

#[test]
fn an_absent_item_is_the_learned_missing_token() {
    let model = moved("bert", Pooling::Cls).for_inference();
    let stored = trained(&model).0;
    let tensor = |name: &str| {
        let found = stored.iter().find(|(stored, ..)| stored == name);
        found
            .map(|(.., numbers)| numbers.clone())
            .expect("it is trained")
    };
    let hidden = model.config().hidden_size();
    let unknown = tensor("fusion.shared.site")[..hidden].to_vec();
    let known = tensor("fusion.shared.site")[2 * hidden..].to_vec();
    let embeddings = &model.fusion.as_ref().unwrap().embeddings;
    let mean = values(embeddings.mean.clone());
    for (stream, name) in [(IMAGE, "xray"), (LABS, "labs"), (VOICE, "voice")] {
        let kind = tensor(&format!("fusion.{name}.type"));
        let missing = tensor(&format!("fusion.{name}.missing"));
        let with_site = |site: &[f32]| -> Vec<f32> {
            let added = kind.iter().zip(site).cycle();
            missing
                .iter()
                .zip(added)
                .zip(mean.iter().cycle())
                .map(|((m, (k, s)), mean)| mean + embeddings.spread * (m + k + s))
                .collect()
        };
        // Beside items of the stream, and without any.
        for streams in [items(), vec![None, None, None, None, None]] {
            let at_a_site = Placement {
                site: Some(1),
                ..place(stream, None)
            };
            let found = tokens(&model, streams, &[place(stream, None), at_a_site]);
            assert!(
                largest_difference(&found[0], &with_site(&unknown)) < CLOSE,
                "{name}"
            );
            assert!(
                largest_difference(&found[1], &with_site(&known)) < CLOSE,
                "{name}"
            );
        }
    }
}

#[test]
fn time_and_site_tell_equal_items_apart() {
    let model = moved("bert", Pooling::Cls).for_inference();
    let at = |days_before, site| Placement {
        days_before,
        site,
        ..place(WAVE, Some(0))
    };
    let placed = [
        at(None, None),
        at(Some(0.0), None),
        at(Some(400.0), None),
        at(None, Some(0)),
        at(None, Some(1)),
        at(None, None),
    ];
    let found = tokens(&model, items(), &placed);
    assert_eq!(found[0], found[5]);
    for (first, a) in found[..5].iter().enumerate() {
        for b in &found[first + 1..5] {
            assert!(largest_difference(a, b) > 1e-3);
        }
    }
}

#[test]
fn the_order_of_observations_does_not_matter() {
    let model = moved("bert", Pooling::Cls).for_inference();
    let series = |order: [usize; 4]| {
        let pick = |numbers: [f32; 4]| floats(order.map(|i| numbers[i]).to_vec(), [1, 4]);
        let mut streams = vec![None, None, None, None, None];
        streams[LABS] = Some(ItemTensors::Series {
            time_days: pick([0.1, 3.0, 0.1, 20.0]),
            variable: integers(order.map(|i| [0, 1, 2, 0][i]).to_vec(), [1, 4]),
            value: pick([1.0, -0.3, 0.2, 2.0]),
            present: floats(vec![1.0; 4], [1, 4]),
        });
        tokens(&model, streams, &[place(LABS, Some(0))]).remove(0)
    };
    let straight = series([0, 1, 2, 3]);
    assert!(largest_difference(&straight, &series([3, 1, 0, 2])) < CLOSE);
    // The value of one at the time of another does.
    let mut streams = vec![None, None, None, None, None];
    streams[LABS] = Some(ItemTensors::Series {
        time_days: floats(vec![3.0, 0.1, 0.1, 20.0], [1, 4]),
        variable: integers(vec![0, 1, 2, 0], [1, 4]),
        value: floats(vec![1.0, -0.3, 0.2, 2.0], [1, 4]),
        present: floats(vec![1.0; 4], [1, 4]),
    });
    let swapped = tokens(&model, streams, &[place(LABS, Some(0))]).remove(0);
    assert!(largest_difference(&straight, &swapped) > 1e-4);
}

#[test]
fn what_is_missing_is_not_a_zero_and_not_a_number_elsewhere() {
    let model = moved("bert", Pooling::Cls).for_inference();
    let genes = |numbers: [f32; 7], there: [f32; 7]| {
        let mut streams = vec![None, None, None, None, None];
        streams[GENES] = Some(ItemTensors::Omics {
            values: floats(numbers.to_vec(), [1, 7]),
            present: floats(there.to_vec(), [1, 7]),
        });
        tokens(&model, streams, &[place(GENES, Some(0))]).remove(0)
    };
    let numbers = [0.5, 0.0, -1.0, 0.3, 2.0, 0.1, -0.2];
    let whole = genes(numbers, [1.0; 7]);
    // Every feature counts, by its value and by whether it is there.
    for feature in 0..7 {
        let mut other = numbers;
        other[feature] += 1.0;
        assert!(
            largest_difference(&whole, &genes(other, [1.0; 7])) > 1e-4,
            "{feature}"
        );
        let mut there = [1.0; 7];
        there[feature] = 0.0;
        assert!(
            largest_difference(&whole, &genes(numbers, there)) > 1e-4,
            "{feature}"
        );
    }
    let wave = |present: f32| {
        let mut streams = vec![None, None, None, None, None];
        streams[WAVE] = Some(ItemTensors::Dense {
            values: floats(vec![0.0; 20], [1, 2, 10]),
            present: floats(
                [vec![1.0; 5], vec![present], vec![1.0; 14]].concat(),
                [1, 2, 10],
            ),
            lengths: vec![10],
        });
        tokens(&model, streams, &[place(WAVE, Some(0))]).remove(0)
    };
    assert!(largest_difference(&wave(1.0), &wave(0.0)) > 1e-5);
}

#[test]
fn an_item_with_nothing_in_it_stays_finite() {
    let model = moved("bert", Pooling::Cls);
    let mut streams = vec![None, None, None, None, None];
    streams[WAVE] = Some(ItemTensors::Dense {
        values: floats(vec![0.0; 20], [1, 2, 10]),
        present: floats(vec![0.0; 20], [1, 2, 10]),
        lengths: vec![0],
    });
    streams[LABS] = Some(ItemTensors::Series {
        time_days: floats(vec![0.0; 2], [1, 2]),
        variable: integers(vec![0; 2], [1, 2]),
        value: floats(vec![0.0; 2], [1, 2]),
        present: floats(vec![0.0; 2], [1, 2]),
    });
    let soft = SoftInput {
        streams,
        placements: vec![place(WAVE, Some(0)), place(LABS, Some(0))],
    };
    let mode = Mode::Train { dropout_seed: 1 };
    let tokens = model.soft_tokens(&soft, mode).unwrap().unwrap();
    let loss = tokens.clone().square().sum();
    assert!(values(tokens).iter().all(|number| number.is_finite()));
    for (name, gradient) in gradients::of(&model, &loss) {
        let finite = |gradient: Vec<f32>| gradient.iter().all(|number| number.is_finite());
        assert!(gradient.is_none_or(finite), "{name}");
    }
}
