use super::*;
use crate::cpu::testing::{random, weigh};

/// `gelu(x · a) · b`, with `x` added.
#[derive(Debug, Clone)]
struct Block {
    a: Tensor<2>,
    b: Tensor<1>,
}

impl Block {
    fn run(&self, input: Tensor<3>) -> Tensor<3> {
        let product = input.clone().matmul(self.a.clone().unsqueeze::<3>());
        crate::gelu(product) * self.b.clone().unsqueeze::<3>() + input
    }
}

fn leaf<const D: usize>(tensor: &Tensor<D>) -> Tensor<D> {
    if tensor.is_require_grad() {
        tensor.clone().inner().autodiff().require_grad()
    } else {
        tensor.clone()
    }
}

impl Segment for Block {
    fn forward(&self, input: Tensor<3>) -> Tensor<3> {
        let (a, b) = (self.a.clone().inner(), self.b.clone().inner());
        Block { a, b }.run(input)
    }

    fn parameters(&self) -> Vec<AnyTensor> {
        let mut parameters = Vec::new();
        if self.a.is_require_grad() {
            parameters.push(self.a.clone().into());
        }
        if self.b.is_require_grad() {
            parameters.push(self.b.clone().into());
        }
        parameters
    }

    fn backward(&self, input: Tensor<3>, gradient: Tensor<3>, wanted: Wanted) -> SegmentGradients {
        let block = Block {
            a: leaf(&self.a),
            b: leaf(&self.b),
        };
        let input = match wanted {
            Wanted::InputAndParameters => input.autodiff().require_grad(),
            Wanted::Parameters => input,
        };
        let mut found = (block.run(input.clone()) * gradient).sum().backward();
        let mut parameters = Vec::new();
        if block.a.is_require_grad() {
            parameters.push(block.a.grad_remove(&mut found).map(AnyTensor::from));
        }
        if block.b.is_require_grad() {
            parameters.push(block.b.grad_remove(&mut found).map(AnyTensor::from));
        }
        SegmentGradients {
            input: input.grad_remove(&mut found),
            parameters,
        }
    }
}

fn bits<const D: usize>(tensor: Option<Tensor<D>>) -> Option<Vec<u32>> {
    let values = tensor?.into_data().try_into_vec::<f32>().expect("f32");
    Some(values.into_iter().map(f32::to_bits).collect())
}

/// Two blocks in a row behind something tracked or not, their second parameter trained or not.
#[test]
fn values_and_gradients_are_those_of_the_plain_pass_to_the_bit() {
    for (input_trained, bias_trained) in
        [(true, true), (true, false), (false, true), (false, false)]
    {
        let x = random([2, 5, 8], 1).set_require_grad(input_trained);
        let blocks = [2, 4].map(|seed| Block {
            a: random([8, 8], seed).require_grad(),
            b: random([8], seed + 1).set_require_grad(bias_trained),
        });
        let pass = |kept: Option<KeptOn>| {
            let mut states = x.clone() * 1.5;
            for block in &blocks {
                states = match kept {
                    None => block.run(states),
                    Some(kept) => recompute(states, Arc::new(block.clone()), kept),
                };
            }
            let values = bits(Some(states.clone().inner()));
            let mut found = weigh(states).backward();
            let mut gradients = vec![values, bits(x.grad_remove(&mut found))];
            for block in &blocks {
                gradients.push(bits(block.a.grad_remove(&mut found)));
                gradients.push(bits(block.b.grad_remove(&mut found)));
            }
            gradients
        };
        let plain = pass(None);
        assert_eq!(plain[1].is_some(), input_trained);
        assert!(plain[2].is_some() && plain[3].is_some() == bias_trained);
        assert_eq!(pass(Some(KeptOn::Device)), plain);
        assert_eq!(pass(Some(KeptOn::Host)), plain);
    }
}

#[test]
fn without_anything_trained_there_is_no_graph() {
    let block = Block {
        a: random([4, 4], 1),
        b: random([4], 2),
    };
    let x = random([1, 3, 4], 3);
    let output = recompute(x.clone(), Arc::new(block.clone()), KeptOn::Device);
    assert!(!output.is_tracked());
    assert_eq!(bits(Some(output)), bits(Some(block.run(x))));
}
