//! Operations on any number of tensors, which a backend extension cannot declare: burn's fusion sees
//! one operation, and a kernel takes as many tensors as the device binds at once.

use burn::backend::fusion::custom::{
    CustomOpIr, HandleContainer, OperationFn, OperationIr, StreamId, TensorIr, TensorSpec,
};
use burn::backend::fusion::{FusionBackend, FusionRuntime};
use burn_cubecl::CubeBackend;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;

use super::operation::Value;

type Handles =
    HandleContainer<<<CubeBackend as FusionBackend>::FusionRuntime as FusionRuntime>::FusionHandle>;

/// Runs `run` on all inputs, one at least. `outputs` says what it gives.
pub(crate) fn apply_to_all(
    name: &'static str,
    inputs: Vec<Value>,
    outputs: Vec<TensorSpec>,
    run: impl Fn(Vec<CubeTensor>) -> Vec<CubeTensor> + Send + Sync + 'static,
) -> Vec<Value> {
    let client = inputs[0].client.clone();
    let inputs: Vec<TensorIr> = inputs.into_iter().map(|input| input.into_ir()).collect();
    let output = |spec: TensorSpec| {
        let id = client.create_empty_handle();
        TensorIr::uninit(id, spec.shape, spec.dtype)
    };
    let outputs: Vec<TensorIr> = outputs.into_iter().map(output).collect();
    let description = CustomOpIr {
        id: name.into(),
        inputs: inputs.clone(),
        outputs: outputs.clone(),
        scalars: vec![],
    };
    let operation = OperationFn(move |handles: &mut Handles| {
        let inputs = inputs
            .iter()
            .map(|input| handles.get_float_tensor::<CubeBackend>(input));
        let found = run(inputs.collect());
        assert_eq!(found.len(), outputs.len(), "results of {name}");
        for (output, found) in outputs.iter().zip(found) {
            handles.register_float_tensor::<CubeBackend>(&output.id, found);
        }
        Ok(())
    });
    let description = OperationIr::Custom(description);
    client.register(StreamId::current(), description, operation)
}

/// Which tensors go into one kernel: alike by their keys, and `most` at once. Of a few sizes, so that
/// few kernels are compiled.
pub(crate) fn groups<K: PartialEq + Clone>(
    keys: impl IntoIterator<Item = K>,
    most: usize,
) -> Vec<(K, Vec<usize>)> {
    let mut kinds: Vec<(K, Vec<usize>)> = vec![];
    for (index, key) in keys.into_iter().enumerate() {
        match kinds.iter_mut().find(|(known, _)| *known == key) {
            Some((_, members)) => members.push(index),
            None => kinds.push((key, vec![index])),
        }
    }
    let mut groups = vec![];
    for (key, members) in kinds {
        let mut rest = members.as_slice();
        for size in [64, 16, 4, 1] {
            while size <= most.max(1) && size <= rest.len() {
                let (group, others) = rest.split_at(size);
                groups.push((key.clone(), group.to_vec()));
                rest = others;
            }
        }
    }
    groups
}

/// How many tensors the device binds at once, with `bindings` buffers each.
pub(crate) fn most_at_once(tensor: &CubeTensor, bindings: usize) -> usize {
    let most = tensor.client.properties().hardware.max_bindings as usize;
    // What describes them takes one more.
    most.saturating_sub(1) / bindings
}

/// A contiguous tensor with a buffer that is its alone, to be written in place.
pub(crate) fn owned(shared: CubeTensor) -> CubeTensor {
    let contiguous = into_contiguous(shared);
    match contiguous.can_mut() {
        true => contiguous,
        false => contiguous.copy(),
    }
}
