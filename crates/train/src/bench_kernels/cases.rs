//! The operations that are timed, at the sizes of a block.

use std::cell::RefCell;

use burn::tensor::{DType, Int, Tensor, TensorData};
use calor_kernels::{
    AdamWTensor, AdamWUpdate, AttentionOptions, FrozenWeight, HostWeight, LinearPart, Lora, Norm,
    Quantization, QuantizedWeight, reference,
};

use super::compare::{Leaf, TensorError};
use super::{Bench, BlockShape, OperationTime, Work};
use crate::TrainError;

type Attention =
    fn(Tensor<4>, Tensor<4>, Tensor<4>, Tensor<2, Int>, &AttentionOptions) -> Tensor<4>;
type Update = fn(Vec<AdamWTensor>, f32) -> Vec<[Tensor<1>; 3]>;
type Gated = fn(Tensor<3>, Tensor<3>) -> Tensor<3>;

impl Bench<'_> {
    pub(super) fn linears(&mut self) -> Result<(), TrainError> {
        let BlockShape {
            hidden,
            intermediate,
            rank,
            ..
        } = self.options.shape;
        for (name, inputs, outputs) in [
            ("lora_linear, hidden to hidden", hidden, hidden),
            ("lora_linear, hidden to intermediate", hidden, intermediate),
            ("lora_linear, intermediate to hidden", intermediate, hidden),
        ] {
            if !self.wanted(name) {
                continue;
            }
            let x = self.states(inputs).require_grad();
            let weight = self.of([outputs, inputs]);
            let lora = Lora {
                a: self.wide([rank, inputs]).require_grad(),
                b: self.wide([outputs, rank]).require_grad(),
                scaling: 2.0,
                dropout: 0.0,
                dropout_seed: 0,
            };
            let tokens = self.tokens();
            let [inputs, outputs, rank] = [inputs, outputs, rank].map(|size| size as f64);
            let work = Work {
                flops: tokens * (4.0 * inputs * outputs + 8.0 * rank * (inputs + outputs)),
                bytes: self.bytes(tokens * 3.0 * (inputs + outputs) + 2.0 * inputs * outputs),
            };
            let inputs = [
                Leaf::new("x", &x),
                Leaf::new("a", &lora.a),
                Leaf::new("b", &lora.b),
            ];
            self.time(
                name,
                work,
                &inputs,
                || calor_kernels::lora_linear(x.clone(), weight.clone(), None, Some(&lora)),
                || reference::lora_linear(x.clone(), weight.clone(), None, Some(&lora), None),
            )?;
        }
        Ok(())
    }

    /// Those that read the same input; their results side by side.
    pub(super) fn joint_linears(&mut self) -> Result<(), TrainError> {
        let BlockShape {
            hidden,
            intermediate,
            heads,
            kv_heads,
            head_dim,
            rank,
            ..
        } = self.options.shape;
        let [queries, keys] = [heads, kv_heads].map(|heads| heads * head_dim);
        for (name, widths) in [
            ("lora_linears, q/k/v", vec![queries, keys, keys]),
            ("lora_linears, gate/up", vec![intermediate, intermediate]),
        ] {
            if !self.wanted(name) {
                continue;
            }
            let x = self.states(hidden).require_grad();
            let weights: Vec<Tensor<2>> = widths
                .iter()
                .map(|outputs| self.of([*outputs, hidden]))
                .collect();
            let pair = |outputs: &usize| Lora {
                a: self.wide([rank, hidden]).require_grad(),
                b: self.wide([*outputs, rank]).require_grad(),
                scaling: 2.0,
                dropout: 0.0,
                dropout_seed: 0,
            };
            let pairs: Vec<Lora> = widths.iter().map(pair).collect();
            let parts = || -> Vec<LinearPart<'_>> {
                let part = |(weight, lora): (_, &Lora)| LinearPart {
                    weight: FrozenWeight::Dense(weight),
                    bias: None,
                    lora: Some(lora.clone()),
                };
                weights.iter().zip(&pairs).map(part).collect()
            };
            let tokens = self.tokens();
            let outputs = widths.iter().sum::<usize>() as f64;
            let [hidden, rank] = [hidden, rank].map(|size| size as f64);
            let count = widths.len() as f64;
            let work = Work {
                flops: tokens * (4.0 * hidden * outputs + 8.0 * rank * (count * hidden + outputs)),
                bytes: self.bytes(tokens * 3.0 * (hidden + outputs) + 2.0 * hidden * outputs),
            };
            let leaves = [
                Leaf::new("x", &x),
                Leaf::new("a", &pairs[0].a),
                Leaf::new("b", &pairs[0].b),
            ];
            self.time(
                name,
                work,
                &leaves,
                || Tensor::cat(calor_kernels::lora_linears(x.clone(), parts()), 2),
                || Tensor::cat(reference::lora_linears(x.clone(), parts()), 2),
            )?;
        }
        Ok(())
    }

    /// The widening layer with its weight in fewer bits.
    pub(super) fn quantized_linears(&mut self) -> Result<(), TrainError> {
        let BlockShape {
            hidden: inputs,
            intermediate: outputs,
            rank,
            ..
        } = self.options.shape;
        for (name, quantization, bits) in [
            ("quantized_linear, int8", Quantization::Int8, 8.0),
            (
                "quantized_linear, nf4",
                Quantization::Nf4 { double: true },
                4.13,
            ),
        ] {
            if !self.wanted(name) {
                continue;
            }
            let x = self.states(inputs).require_grad();
            let values = self.wide([outputs, inputs]).inner().into_data();
            let values = values.try_into_vec::<f32>().expect("drawn in f32");
            let host = HostWeight::quantize(&values, inputs, quantization);
            let weight = QuantizedWeight::new(host, [outputs, inputs], self.device);
            let lora = Lora {
                a: self.wide([rank, inputs]).require_grad(),
                b: self.wide([outputs, rank]).require_grad(),
                scaling: 2.0,
                dropout: 0.0,
                dropout_seed: 0,
            };
            let leaves = [
                Leaf::new("x", &x),
                Leaf::new("a", &lora.a),
                Leaf::new("b", &lora.b),
            ];
            let tokens = self.tokens();
            let [inputs, outputs, rank] = [inputs, outputs, rank].map(|size| size as f64);
            let work = Work {
                flops: tokens * (4.0 * inputs * outputs + 8.0 * rank * (inputs + outputs)),
                bytes: self.bytes(tokens * 3.0 * (inputs + outputs))
                    + 2.0 * inputs * outputs * bits / 8.0,
            };
            self.time(
                name,
                work,
                &leaves,
                || calor_kernels::quantized_linear(x.clone(), &weight, None, Some(&lora)),
                || reference::quantized_linear(x.clone(), &weight, None, Some(&lora), None),
            )?;
        }
        Ok(())
    }

    /// Causal over whole rows, as a decoder of one patient a row; and to both sides over rows of
    /// several segments, as an encoder of packed patients.
    pub(super) fn attention(&mut self) -> Result<(), TrainError> {
        let BlockShape {
            batch,
            seq,
            heads,
            kv_heads,
            head_dim,
            ..
        } = self.options.shape;
        // Of each row, and the same in all of them.
        let packed: Vec<usize> = match seq {
            0..4 => vec![seq],
            _ => vec![seq / 2, seq / 3, seq - seq / 2 - seq / 3],
        };
        for (name, causal, lengths) in [
            ("attention, causal", true, vec![seq]),
            ("attention, to both sides, packed", false, packed),
        ] {
            if !self.wanted(name) {
                continue;
            }
            let query = self.of([batch, seq, heads, head_dim]).require_grad();
            let key = self.of([batch, seq, kv_heads, head_dim]).require_grad();
            let value = self.of([batch, seq, kv_heads, head_dim]).require_grad();
            let numbers = (1i32..).zip(&lengths);
            let row: Vec<i32> = numbers
                .flat_map(|(number, length)| vec![number; *length])
                .collect();
            let segments = TensorData::new(row, [1, seq]);
            let segments = Tensor::<2, Int>::from_data(segments, (self.device, DType::I32));
            let segments = segments.repeat_dim(0, batch);
            let options = AttentionOptions {
                causal,
                window: None,
                scale: (head_dim as f32).sqrt().recip(),
                soft_cap: None,
            };
            let squares: f64 = lengths.iter().map(|length| (*length as f64).powi(2)).sum();
            let seen = if causal { 0.5 } else { 1.0 };
            let pairs = (batch * heads) as f64 * squares * seen;
            let work = Work {
                // Two products forward and five backward.
                flops: 14.0 * pairs * head_dim as f64,
                bytes: self.bytes(self.tokens() * (6 * (heads + kv_heads) * head_dim) as f64),
            };
            let inputs = [
                Leaf::new("query", &query),
                Leaf::new("key", &key),
                Leaf::new("value", &value),
            ];
            let run = |attention: Attention| {
                let (query, key, value) = (query.clone(), key.clone(), value.clone());
                attention(query, key, value, segments.clone(), &options)
            };
            self.time(
                name,
                work,
                &inputs,
                || run(calor_kernels::attention),
                || run(reference::attention),
            )?;
        }
        Ok(())
    }

    pub(super) fn elementwise(&mut self) -> Result<(), TrainError> {
        let BlockShape {
            batch,
            seq,
            hidden,
            intermediate,
            heads,
            head_dim,
            ..
        } = self.options.shape;
        let states = self.tokens() * hidden as f64;
        let inner = self.tokens() * intermediate as f64;
        if self.wanted("rms_norm") {
            let x = self.states(hidden).require_grad();
            let weight = self.of([hidden]);
            self.time(
                "rms_norm",
                self.moving(5.0 * states),
                &[Leaf::new("x", &x)],
                || calor_kernels::rms_norm(x.clone(), weight.clone(), 1e-5),
                || reference::rms_norm(x.clone(), weight.clone(), 1e-5),
            )?;
        }
        if self.wanted("layer_norm") {
            let x = self.states(hidden).require_grad();
            let (weight, bias) = (self.of([hidden]), self.of([hidden]));
            self.time(
                "layer_norm",
                self.moving(5.0 * states),
                &[Leaf::new("x", &x)],
                || calor_kernels::layer_norm(x.clone(), weight.clone(), bias.clone(), 1e-5),
                || reference::layer_norm(x.clone(), weight.clone(), bias.clone(), 1e-5),
            )?;
        }
        if self.wanted("residual_norm") {
            let [x, update] = [(); 2].map(|()| self.states(hidden).require_grad());
            let weight = self.of([hidden]);
            let norm = || Norm {
                weight: weight.clone(),
                bias: None,
                epsilon: 1e-5,
            };
            let both = |(sum, normed): (Tensor<3>, Tensor<3>)| sum + normed;
            self.time(
                "residual_norm",
                self.moving(8.0 * states),
                &[Leaf::new("x", &x), Leaf::new("update", &update)],
                || {
                    let update = Some(update.clone());
                    both(calor_kernels::residual_norm(x.clone(), update, norm()))
                },
                || {
                    let update = Some(update.clone());
                    both(reference::residual_norm(x.clone(), update, norm()))
                },
            )?;
        }
        let gated: [(_, Gated, Gated); 2] = [
            ("swiglu", calor_kernels::swiglu, reference::swiglu),
            ("geglu", calor_kernels::geglu, reference::geglu),
        ];
        for (name, kernel, plain) in gated {
            if !self.wanted(name) {
                continue;
            }
            let gate = self.states(intermediate).require_grad();
            let up = self.states(intermediate).require_grad();
            self.time(
                name,
                self.moving(8.0 * inner),
                &[Leaf::new("gate", &gate), Leaf::new("up", &up)],
                || kernel(gate.clone(), up.clone()),
                || plain(gate.clone(), up.clone()),
            )?;
        }
        if self.wanted("gelu") {
            let x = self.states(intermediate).require_grad();
            self.time(
                "gelu",
                self.moving(5.0 * inner),
                &[Leaf::new("x", &x)],
                || calor_kernels::gelu(x.clone()),
                || reference::gelu(x.clone()),
            )?;
        }
        if self.wanted("rotary") {
            let x = self.of([batch, seq, heads, head_dim]).require_grad();
            // Both halves of a table are the same.
            let tables = [(); 2].map(|()| {
                let half: Tensor<3> = self.of([batch, seq, head_dim / 2]);
                Tensor::cat(vec![half.clone(), half], 2)
            });
            let [cos, sin] = &tables;
            self.time(
                "rotary",
                self.moving(4.0 * self.tokens() * (heads * head_dim) as f64),
                &[Leaf::new("x", &x)],
                || calor_kernels::rotary(x.clone(), cos.clone(), sin.clone()),
                || reference::rotary(x.clone(), cos.clone(), sin.clone()),
            )?;
        }
        Ok(())
    }

    pub(super) fn cross_entropy(&mut self) -> Result<(), TrainError> {
        let BlockShape {
            batch,
            seq,
            hidden,
            vocab,
            ..
        } = self.options.shape;
        let name = "linear_cross_entropy";
        if !self.wanted(name) {
            return Ok(());
        }
        let states = self.of([batch * seq, hidden]).require_grad();
        let weight = self.of([vocab, hidden]);
        let targets = Tensor::<1, Int>::arange(0..(batch * seq) as i64, self.device)
            .remainder_scalar(vocab as i64);
        let work = Work {
            flops: 4.0 * self.tokens() * (hidden * vocab) as f64,
            bytes: self.bytes(3.0 * self.tokens() * hidden as f64 + 2.0 * (hidden * vocab) as f64),
        };
        let inputs = [Leaf::new("states", &states)];
        let (states, weight) = (&states, &weight);
        self.time(
            name,
            work,
            &inputs,
            || {
                let (states, weight) = (states.clone(), weight.clone());
                calor_kernels::linear_cross_entropy(states, weight, targets.clone(), None)
            },
            || {
                let (states, weight) = (states.clone(), weight.clone());
                reference::linear_cross_entropy(states, weight, targets.clone(), None)
            },
        )
    }

    /// All pairs of one block's square linears, an update each.
    pub(super) fn adamw(&mut self) -> Result<(), TrainError> {
        let name = "adamw, 14 tensors";
        if !self.wanted(name) {
            return Ok(());
        }
        let BlockShape { hidden, rank, .. } = self.options.shape;
        let tensors: Vec<Tensor<1>> = (0..14)
            .map(|_| {
                self.wide([1, rank * hidden])
                    .inner()
                    .reshape([rank * hidden])
            })
            .collect();
        let update = AdamWUpdate {
            beta_1: 0.9,
            beta_2: 0.999,
            epsilon: 1e-8,
            learning_rate: 1e-4,
            weight_decay: 0.01,
            step: 3,
        };
        let one = |tensor: Tensor<1>| AdamWTensor {
            values: tensor.clone(),
            gradient: tensor.clone() * 0.9,
            first: tensor.clone() * 1.1,
            second: tensor.abs(),
            update,
        };
        let tensors: Vec<AdamWTensor> = tensors.into_iter().map(one).collect();
        let all = |run: Update| run(tensors.clone(), 0.5);
        // As in training nothing else holds gradient and moments: what an update leaves is the next
        // one's, with the old values as its gradient.
        let next = RefCell::new(all(reference::adamw));
        let gradients = tensors.iter().map(|tensor| tensor.gradient.clone() * 1.0);
        let gradients: RefCell<Vec<Tensor<1>>> = RefCell::new(gradients.collect());
        let step = |run: Update| {
            let (mut before, state) = (vec![], next.take());
            let tensors = state.into_iter().zip(gradients.take());
            let tensors = tensors.map(|([values, first, second], gradient)| {
                before.push(values.clone());
                AdamWTensor {
                    values,
                    gradient,
                    first,
                    second,
                    update,
                }
            });
            next.replace(run(tensors.collect(), 0.5));
            gradients.replace(before);
        };
        let both_s = self.median_s(|| step(calor_kernels::adamw))?;
        let mut found = OperationTime {
            name: name.to_owned(),
            forward_s: both_s,
            both_s,
            reference_both_s: None,
            floor_s: (14 * rank * hidden * 7 * 4) as f64 / self.peak_bytes_per_s,
            errors: Vec::new(),
            peak_bytes: None,
            reference_peak_bytes: None,
        };
        if self.options.with_reference {
            found.reference_both_s = Some(self.median_s(|| step(reference::adamw))?);
            let (kernel, plain) = (all(calor_kernels::adamw), all(reference::adamw));
            let names = ["values", "first", "second"];
            found.errors = names
                .into_iter()
                .enumerate()
                .map(|(part, name)| {
                    let pick = |all: &[[Tensor<1>; 3]]| all[0][part].clone();
                    TensorError::of(name, pick(&kernel), pick(&plain))
                })
                .collect();
            found.peak_bytes = self.peak_bytes(|| step(calor_kernels::adamw))?;
            found.reference_peak_bytes = self.peak_bytes(|| step(reference::adamw))?;
        }
        self.operations.push(found);
        Ok(())
    }
}
