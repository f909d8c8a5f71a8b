//! The prompts that a text-to-image teacher is asked about: lines of files, and templates with lists.

use std::collections::HashMap;
use std::path::Path;

use sha2::{Digest, Sha256};
use understudy_models::checkpoint::read;
use understudy_models::{Error, Result};

use crate::data::hex;

/// Bytes of the largest file of prompts that is read.
const FILE_LIMIT: u64 = 1 << 30;
/// Most prompts: a table of CLIP's states would take terabytes.
const MOST: usize = 1 << 24;

/// Prompts, each different from the others, and where each comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prompts {
    /// As messages say them: `--prompts FILE, line`.
    sources: Vec<String>,
    texts: Vec<String>,
    /// The source of each, and its line, combination or picture there, counted from 1.
    places: Vec<(usize, usize)>,
}

impl Prompts {
    /// Reads prompts from each of `sources`: a file with one prompt a line, or a template such as
    /// `"{red|blue} {apple|house}, flat style"`, which stands for every combination of a choice from each of its lists.
    /// White space around a prompt is no part of it.
    ///
    /// # Errors
    /// [`Error::Value`] naming the line that is blank, not UTF-8 or there already, or what is wrong with a template;
    /// [`Error::Io`] naming a file that cannot be read.
    pub fn read(sources: &[String]) -> Result<Self> {
        let mut all = Self { sources: Vec::new(), texts: Vec::new(), places: Vec::new() };
        let mut seen: HashMap<String, usize> = HashMap::new();
        for (source, name) in sources.iter().enumerate() {
            let (texts, said) = match name.contains('{') && !Path::new(name).exists() {
                true => (combinations(name)?, format!("--prompts {name:?}, combination")),
                false => (lines(name)?, format!("--prompts {name}, line")),
            };
            all.sources.push(said);
            for (index, text) in texts.into_iter().enumerate() {
                all.places.push((source, index + 1));
                all.texts.push(text.trim().to_owned());
                let number = all.texts.len() - 1;
                let text = &all.texts[number];
                if text.is_empty() {
                    let remedy = "write a prompt there, or take it out; the empty prompt is always asked about";
                    return Err(Error::value(all.place(number), "blank", remedy));
                }
                if let Some(other) = seen.insert(text.clone(), number) {
                    let remedy = format!("{} has it already; take one out", all.place(other));
                    return Err(Error::value(all.place(number), format!("{text:?}"), remedy));
                }
            }
            if all.texts.len() > MOST {
                let remedy = format!("at most {MOST} are taken");
                return Err(Error::value("--prompts", all.texts.len(), remedy));
            }
        }
        match all.texts.is_empty() {
            true => Err(Error::value("--prompts", "no prompts", "write at least one, a line each")),
            false => Ok(all),
        }
    }

    /// The captions of pictures, each once, and which of them each picture has; none where it is empty.
    pub fn of_captions(captions: &[String]) -> (Self, Vec<Option<usize>>) {
        let sources = vec!["--data, the caption of picture".to_owned()];
        let mut all = Self { sources, texts: Vec::new(), places: Vec::new() };
        let mut seen: HashMap<&str, usize> = HashMap::new();
        let mut numbers = Vec::new();
        for (picture, caption) in captions.iter().enumerate() {
            let text = caption.trim();
            numbers.push((!text.is_empty()).then(|| {
                *seen.entry(text).or_insert_with(|| {
                    all.places.push((0, picture + 1));
                    all.texts.push(text.to_owned());
                    all.texts.len() - 1
                })
            }));
        }
        (all, numbers)
    }

    /// The texts.
    pub fn texts(&self) -> &[String] {
        &self.texts
    }

    /// Some of them, evenly spaced: `count`, or all where there are fewer.
    #[must_use]
    pub fn thinned(&self, count: usize) -> Self {
        let all = self.texts.len();
        let count = count.min(all);
        let chosen = || (0..count).map(|index| index * all / count);
        Self {
            sources: self.sources.clone(),
            texts: chosen().map(|index| self.texts[index].clone()).collect(),
            places: chosen().map(|index| self.places[index]).collect(),
        }
    }

    /// Where prompt `index` stands, as messages say it.
    pub fn place(&self, index: usize) -> String {
        let (source, number) = self.places[index];
        format!("{} {number}", self.sources[source])
    }

    /// SHA-256 of the texts, a line each, in hexadecimal.
    pub fn sha256(&self) -> String {
        let mut hash = Sha256::new();
        for text in &self.texts {
            hash.update(text);
            hash.update("\n");
        }
        hex(&hash.finalize())
    }
}

/// The lines of a file.
fn lines(name: &str) -> Result<Vec<String>> {
    let bytes = read::whole(Path::new(name), FILE_LIMIT).map_err(|error| match error {
        Error::Io { source, .. } => Error::value(
            "--prompts",
            format!("{name:?}"),
            format!("{source}; name a file of prompts, or write a template with lists such as \"{{red|blue}} apple\""),
        ),
        error => error,
    })?;
    let bytes = bytes.strip_suffix(b"\n").unwrap_or(&bytes);
    if bytes.is_empty() {
        return Ok(Vec::new());
    }
    let line = |(index, line): (usize, &[u8])| match std::str::from_utf8(line) {
        Ok(text) => Ok(text.to_owned()),
        Err(_) => Err(Error::value(
            format!("--prompts {name}, line {}", index + 1),
            "not UTF-8",
            "write the file in UTF-8",
        )),
    };
    bytes.split(|byte| *byte == b'\n').enumerate().map(line).collect()
}

/// All that a template stands for, the last list changing fastest.
fn combinations(template: &str) -> Result<Vec<String>> {
    let refuse = |problem: &str| {
        let remedy = format!("{problem}; a list is written {{red|green|blue}}");
        Err(Error::value("--prompts", format!("{template:?}"), remedy))
    };
    let mut texts = vec![String::new()];
    let mut rest = template;
    while let Some((before, after)) = rest.split_once('{') {
        if before.contains('}') {
            return refuse("a } has no { before it");
        }
        let Some((list, after)) = after.split_once('}') else {
            return refuse("a { has no } after it");
        };
        if list.contains('{') {
            return refuse("a list holds another");
        }
        let choices: Vec<&str> = list.split('|').collect();
        if texts.len().saturating_mul(choices.len()) > MOST {
            return refuse(&format!("it stands for more than {MOST} prompts"));
        }
        let with =
            |text: String| choices.iter().map(move |choice| format!("{text}{before}{choice}"));
        let longer: Vec<String> = texts.iter().cloned().flat_map(with).collect();
        (texts, rest) = (longer, after);
    }
    if rest.contains('}') {
        return refuse("a } has no { before it");
    }
    texts.iter_mut().for_each(|text| text.push_str(rest));
    Ok(texts)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn read(source: &str) -> Result<Prompts> {
        Prompts::read(&[source.to_owned()])
    }

    fn file(home: &tempfile::TempDir, bytes: &[u8]) -> String {
        let path = home.path().join("prompts.txt");
        std::fs::write(&path, bytes).unwrap();
        path.display().to_string()
    }

    #[test]
    fn a_template_stands_for_every_combination() {
        let prompts = read("{red|blue} {apple|house}, flat style").unwrap();
        let expected = ["red apple", "red house", "blue apple", "blue house"];
        assert_eq!(prompts.texts(), expected.map(|text| format!("{text}, flat style")));
        assert_eq!(read("{|red }apple").unwrap().texts(), ["apple", "red apple"]);
        for (template, words) in [
            ("{red apple", "no } after"),
            ("red} {a|b}", "no { before"),
            ("{a|b} c}", "no { before"),
            ("{a|{b|c}}", "holds another"),
            ("{a|a}", "combination 1 has it already"),
            ("{|a}", "combination 1` is blank"),
        ] {
            let problem = read(template).unwrap_err().to_string();
            assert!(problem.contains(words), "{template}: {problem}");
        }
    }

    #[test]
    fn lines_that_are_no_prompts_are_named() {
        let home = tempfile::tempdir().unwrap();
        let prompts = read(&file(&home, b"red apple \r\ndog, {flat} style\n")).unwrap();
        assert_eq!(prompts.texts(), ["red apple", "dog, {flat} style"]);
        for (bytes, words) in [
            (&b"apple\n\nhouse\n"[..], vec!["line 2` is blank"]),
            (b"apple\nhouse\n  apple\n", vec!["line 3", "\"apple\"", "line 1 has it already"]),
            (b"apple\nh\xffouse", vec!["line 2` is not UTF-8"]),
            (b"\n", vec!["no prompts"]),
            (b"", vec!["is empty"]),
        ] {
            let problem = read(&file(&home, bytes)).unwrap_err().to_string();
            assert!(words.iter().all(|word| problem.contains(word)), "{problem}");
        }
        let problem = read("nowhere.txt").unwrap_err().to_string();
        assert!(problem.contains("nowhere.txt") && problem.contains("template"), "{problem}");
    }

    #[test]
    fn a_part_is_spaced_evenly_and_knows_its_places() {
        let prompts = read("{0|1|2|3|4|5|6|7|8|9}").unwrap();
        let part = prompts.thinned(3);
        assert_eq!(part.texts(), ["0", "3", "6"]);
        assert!(part.place(2).contains("combination 7"));
        assert_eq!(prompts.thinned(99), prompts);
        assert_ne!(part.sha256(), prompts.sha256());
    }
}
