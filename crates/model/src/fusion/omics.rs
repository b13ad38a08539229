//! The encoder of feature vectors: one token a group of features, each group with weights of its
//! own, then a transformer.

use burn::tensor::{Device, Int, Tensor, TensorData};

use super::encoder::Encoded;
use super::new::{New, floats, glorot};
use super::options::OmicsEncoderOptions;
use super::transformer::{Transformer, segments};
use crate::parameter::{Parameter, Visit};
use crate::random::Stream;
use crate::run::Mode;

#[derive(Debug, Clone)]
pub(super) struct Omics {
    /// Of the values and of what is there of them: `[groups, 2 · longest, width]`; zero and without
    /// use behind a shorter group's end.
    weight: Parameter<3>,
    /// Added to each group's token: `[groups, width]`.
    group: Parameter<2>,
    transformer: Transformer,
    groups: Groups,
    width: usize,
    /// Share of the features that count as missing in training, and what names the draws.
    dropout: f64,
    path: String,
}

/// The groups as a rectangle, shorter ones padded.
#[derive(Debug, Clone)]
struct Groups {
    count: usize,
    longest: usize,
    /// Feature numbers, `[count · longest]`.
    features: Tensor<1, Int>,
    /// 1 for a feature, 0 for padding, `[1, count, longest]`.
    real: Tensor<3>,
}

impl Omics {
    pub fn new(new: &New, options: &OmicsEncoderOptions) -> Omics {
        let width = options.width;
        let lists = match options.groups.is_empty() {
            false => options.groups.clone(),
            true => (0..options.features)
                .collect::<Vec<_>>()
                .chunks(options.chunk)
                .map(<[usize]>::to_vec)
                .collect(),
        };
        let groups = Groups::new(&lists, new.device);
        let longest = groups.longest;
        let mut weight = Vec::with_capacity(groups.count * 2 * longest * width);
        let mut numbers = new.stream("weight");
        for list in &lists {
            let bound = glorot(2 * list.len(), width);
            // The values' rows, then the presences'.
            for _ in 0..2 {
                weight.extend(numbers.uniform(list.len() * width, bound));
                weight.resize(weight.len() + (longest - list.len()) * width, 0.0);
            }
        }
        Omics {
            weight: new.parameter(
                "weight",
                new.tensor(weight, [groups.count, 2 * longest, width]),
            ),
            group: new.normal("group", [groups.count, width], 0.5),
            transformer: Transformer::new(new, width, options.depth, options.heads),
            groups,
            width,
            dropout: options.dropout,
            path: new.path.clone(),
        }
    }

    pub fn width(&self) -> usize {
        self.width
    }

    /// values, present `[items, features]`; returns `[items, groups, width]`. A group without a
    /// single value is a token that says so.
    pub fn forward(&self, values: Tensor<2>, present: Tensor<2>, mode: Mode) -> Encoded {
        let [items, features] = values.dims();
        let device = values.device();
        let (values, present) = match self.kept(items, features, mode) {
            Some(kept) => {
                let kept = floats(kept, [items, features], &device);
                (values * kept.clone(), present * kept)
            }
            None => (values, present),
        };
        let inputs = Tensor::cat(vec![self.groups.of(values), self.groups.of(present)], 2);
        let tokens = calor_kernels::matmul(inputs.swap_dims(0, 1), self.weight.tensor.clone())
            .swap_dims(0, 1)
            + self.group.tensor.clone().unsqueeze::<3>();
        let count = self.groups.count;
        let segments = segments(&vec![count; items], count, &device);
        Encoded {
            tokens: self.transformer.forward(tokens, &segments, mode),
            mask: None,
        }
    }

    /// 0 for features that count as missing in this step, else 1; none where all are kept.
    fn kept(&self, items: usize, features: usize, mode: Mode) -> Option<Vec<f32>> {
        let Mode::Train { dropout_seed } = mode else {
            return None;
        };
        if self.dropout == 0.0 {
            return None;
        }
        // Uniform from -1 to 1: so many lie below.
        let below = (2.0 * self.dropout - 1.0) as f32;
        let drawn = Stream::new(dropout_seed, &self.path).uniform(items * features, 1.0);
        let kept = drawn.into_iter().map(|drawn| f32::from(drawn >= below));
        Some(kept.collect())
    }

    pub fn visit<V: Visit>(&mut self, visitor: &mut V) {
        visitor.visit(&mut self.weight);
        visitor.visit(&mut self.group);
        self.transformer.visit(visitor);
    }
}

impl Groups {
    fn new(lists: &[Vec<usize>], device: &Device) -> Groups {
        let longest = lists.iter().map(Vec::len).max().unwrap_or(0);
        let mut features = Vec::with_capacity(lists.len() * longest);
        let mut real = Vec::with_capacity(lists.len() * longest);
        for list in lists {
            let padding = longest - list.len();
            features.extend(list.iter().map(|&feature| feature as i32));
            features.resize(features.len() + padding, 0);
            real.resize(real.len() + list.len(), 1.0);
            real.resize(real.len() + padding, 0.0);
        }
        let features = TensorData::new(features, [lists.len() * longest]);
        Groups {
            count: lists.len(),
            longest,
            features: Tensor::from_data(features, device),
            real: floats(real, [1, lists.len(), longest], device),
        }
    }

    /// `[items, features]` → `[items, groups, longest]`
    fn of(&self, features: Tensor<2>) -> Tensor<3> {
        let [items, _] = features.dims();
        features
            .select(1, self.features.clone())
            .reshape([items, self.count, self.longest])
            * self.real.clone()
    }
}
