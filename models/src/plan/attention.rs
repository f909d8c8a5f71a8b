//! Self-attention between its two products.

use super::{Builder, Map, Step};
use crate::kernels::{Attend, Numbers, PackKeys, PackValues};

impl<C> Builder<'_, C> {
    /// The values of `qkv` (scaled queries, keys and values, one after another in the channels) gathered
    /// for each query and head; `qkv` is released.
    pub(crate) fn attend(&mut self, qkv: Map, heads: usize) -> Map {
        let (input, panel, rows) = (self.image(qkv), self.isa.panel(), self.isa.rows());
        let keys = self.take(PackKeys::len(&input, panel));
        self.push(PackKeys { input, heads, panel, output: keys });
        let pairs = (input.numbers == Numbers::Bf16).then(|| {
            let output = self.take(PackValues::len(&input));
            self.push(PackValues { input, output });
            output
        });
        let gathered = self.map(input.height, input.width, input.channels() / 3);
        let output = self.image(gathered);
        self.push(Attend { input, keys, values: pairs, heads, panel, rows, output });
        self.give(keys);
        self.record(Step::Attend { qkv, target: gathered, heads });
        if let Some(pairs) = pairs {
            self.give(pairs);
        }
        self.release(qkv);
        gathered
    }
}
