//! Small models of Stable Diffusion 3's kind.

use std::path::Path;

use crate::folder::copy;

/// Makes a folder one of `models/tests/golden/make_sd3_pipelines.py`, with its tokenizers.
pub(crate) fn put(name: &str, folder: &Path) {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tests/golden");
    copy(&golden.join("sd3_pipeline").join(name), folder);
    for tokenizer in ["tokenizer", "tokenizer_2"] {
        for file in ["vocab.json", "merges.txt"] {
            let from = golden.join("tokenizer").join(file);
            std::fs::copy(from, folder.join(tokenizer).join(file)).unwrap();
        }
    }
    if folder.join("text_encoder_3").exists() {
        copy(&golden.join("t5_tokenizer"), &folder.join("tokenizer_3"));
    }
}
