//! CLIP's vocabulary, which every Stable Diffusion has and no single file holds.
//!
//! `merges.txt.gz` has the merges of byte pairs that OpenAI published with CLIP (`bpe_simple_vocab_16e6.txt` of
//! `openai/CLIP`, its first 48,894; MIT licence, copyright 2021 OpenAI). The vocabulary follows from them: 256 bytes, the same
//! at the end of a word, what each merge makes, and two tokens that begin and end a text.

use std::io::Read;

use flate2::read::GzDecoder;
use serde_json::{Map, Value, json};

use super::tokenizer::CONFIG;
use crate::{Error, Result};

const MERGES: &[u8] = include_bytes!("merges.txt.gz");
const START: &str = "<|startoftext|>";
const END: &str = "<|endoftext|>";
/// Tokens of a prompt.
const LENGTH: usize = 77;

/// The files of a `CLIPTokenizer` of CLIP's vocabulary that fills prompts with `padding`: their names and contents.
///
/// # Errors
/// Never, unless this program is damaged.
pub(crate) fn clip_vocabulary(padding: &str) -> Result<[(&'static str, Vec<u8>); 4]> {
    let mut merges = String::new();
    let damaged = |source| Error::Io { path: "merges.txt.gz".into(), source };
    GzDecoder::new(MERGES).read_to_string(&mut merges).map_err(damaged)?;
    let letters = letters();
    let bytes = letters.iter().map(char::to_string);
    let last = letters.iter().map(|letter| format!("{letter}</w>"));
    let merged = merges.lines().skip(1).map(|line| line.replace(' ', ""));
    let special = [START, END].map(str::to_owned);
    let tokens = bytes.chain(last).chain(merged).chain(special);
    let vocabulary: Map<String, Value> =
        tokens.enumerate().map(|(id, token)| (token, json!(id))).collect();
    let config = json!({
        "tokenizer_class": "CLIPTokenizer",
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": padding,
        "model_max_length": LENGTH,
        "add_prefix_space": false,
        "do_lower_case": true,
        "errors": "replace",
    });
    let roles = ["bos_token", "eos_token", "unk_token", "pad_token"];
    let special: Map<String, Value> =
        roles.iter().map(|role| ((*role).to_owned(), config[role].clone())).collect();
    Ok([
        ("merges.txt", merges.into_bytes()),
        ("vocab.json", Value::Object(vocabulary).to_string().into_bytes()),
        (CONFIG, format!("{config:#}\n").into_bytes()),
        ("special_tokens_map.json", format!("{:#}\n", Value::Object(special)).into_bytes()),
    ])
}

/// A letter for every byte, in the order of the vocabulary: printable bytes are their own, the others follow.
fn letters() -> Vec<char> {
    let printable = |byte: &u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let own = (0..=u8::MAX).filter(printable).map(char::from);
    let count = (0..=u8::MAX).filter(|byte| !printable(byte)).count() as u32;
    own.chain((0..count).filter_map(|i| char::from_u32(256 + i))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::clip::ClipTokenizer;

    #[test]
    fn the_vocabulary_is_clips() {
        let folder = tempfile::tempdir().unwrap();
        for (name, bytes) in clip_vocabulary(END).unwrap() {
            std::fs::write(folder.path().join(name), bytes).unwrap();
        }
        let ours = ClipTokenizer::open(folder.path()).unwrap();
        assert_eq!(ours.vocabulary(), 49_408);
        let theirs = instant_clip_tokenizer::Tokenizer::new();
        for text in [
            "a photo of an astronaut riding a horse on mars",
            "Übergrößenträger, 3.14 €, 日本語 \u{1f600}\u{1f3fd}!",
            "naïve café — “quoted” 'tis o'clock",
            "\u{1}\u{7f}\u{ad}",
        ] {
            let mut tokens = Vec::new();
            theirs.encode(text, &mut tokens);
            let expected: Vec<u32> = tokens.iter().map(|token| u32::from(token.to_u16())).collect();
            assert_eq!(ours.ids(text).unwrap(), expected, "{text}");
        }
    }
}
