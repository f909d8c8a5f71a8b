//! `understudy distill --config recipe.toml`: one run after the other, each as its flags would have it. What is on the command
//! line wins over a stage's keys, these over those above the stages.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::{OsStr, OsString},
    num::NonZeroUsize,
    path::{Path, PathBuf},
};

use clap::{
    Arg, ArgMatches, Args, Command, FromArgMatches, error::ErrorKind, parser::ValueSource,
    value_parser,
};
use toml::{
    Spanned,
    de::{DeTable, DeValue},
};
use understudy_distill::ranks::Alone;
use understudy_models::checkpoint::read;

use super::{
    distill::{self, Before},
    distill_args::DistillArgs,
    interrupt::Interrupt,
    progress::{DRY, duration},
    recipe_keys::{self, Key, Kind, OF_A_STAGE},
};
use crate::names::is_id;

/// The most bytes of a recipe.
const LIMIT: u64 = 1 << 20;

/// Keys whose values may name something beside the recipe.
const PATHS: [&str; 3] = ["teacher", "student", "prompts"];

/// What `understudy distill` is to do.
#[derive(Debug)]
pub(super) enum Distillation {
    /// One run.
    Run(Box<DistillArgs>),
    /// The stages of a recipe.
    Recipe(Recipe),
}

/// Runs in their order.
#[derive(Debug)]
pub(super) struct Recipe {
    file: PathBuf,
    /// At least one.
    pub(super) stages: Vec<Stage>,
}

/// A run of a recipe.
#[derive(Debug)]
pub(super) struct Stage {
    name: String,
    pub(super) args: DistillArgs,
    /// The lines of its keys, and its own under an empty name.
    lines: BTreeMap<String, usize>,
    /// Whether it begins with the stage before.
    goes_on: bool,
}

impl Distillation {
    /// The arguments of the (first) run.
    pub(super) fn first(&self) -> &DistillArgs {
        match self {
            Self::Run(args) => args,
            Self::Recipe(recipe) => &recipe.stages[0].args,
        }
    }
}

impl Args for Distillation {
    fn augment_args(command: Command) -> Command {
        let config = Arg::new("config")
            .long("config")
            .value_name("RECIPE")
            .value_parser(value_parser!(PathBuf))
            .help_heading(None)
            .help("Do the stages of a recipe (TOML), each with the one before as its student. Keys are the long names of flags; flags that are given here win (configs/ has some)");
        let optional = |arg: Arg| arg.required(false).required_unless_present("config");
        DistillArgs::augment_args(command)
            .arg(config)
            .mut_arg("teacher", optional)
            .mut_arg("out", optional)
            .override_usage(
                "understudy distill --teacher <MODEL> --out <DIR> [OPTIONS]\n       understudy distill --config <RECIPE> --out <DIR> [OPTIONS]",
            )
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for Distillation {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let Some(file) = matches.get_one::<PathBuf>("config") else {
            return Ok(Self::Run(Box::new(DistillArgs::from_arg_matches(matches)?)));
        };
        let wrong = |problem: String| clap::Error::raw(ErrorKind::ValueValidation, problem + "\n");
        Ok(Self::Recipe(Recipe::read(file, matches).map_err(wrong)?))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

impl Recipe {
    /// Reads a recipe and what is given beside it on the command line.
    ///
    /// # Errors
    /// A sentence that begins with the file and the line.
    fn read(file: &Path, given: &ArgMatches) -> Result<Self, String> {
        let text = read::text(file, LIMIT).map_err(|error| format!("--config {error}"))?;
        let text = Text { file, text: &text, flags: recipe_keys::flags() };
        let table = DeTable::parse(text.text).map_err(|error| {
            let at = error.span().map_or(0, |span| span.start);
            text.at(at, error.message().trim_end())
        })?;
        let (mut common, mut stages) = (BTreeMap::new(), None);
        for (key, value) in table.get_ref() {
            match key.get_ref().as_ref() {
                "stage" => stages = Some(value),
                _ => drop(common.insert(key.get_ref().to_string(), text.entry(key, value, false)?)),
            }
        }
        let none = || text.at(0, "has no stage; begin each with a line [[stage]]");
        let stages = stages.ok_or_else(none)?;
        let list = stages.get_ref().as_array().filter(|list| !list.is_empty());
        let list = list.ok_or_else(|| {
            text.at(
                stages.span().start,
                "`stage` is a list of tables; begin each with a line [[stage]]",
            )
        })?;
        let given = Given::of(&text.flags, given);
        let of_one =
            OF_A_STAGE.iter().find_map(|flag| common.get(*flag).map(|entry| (flag, entry)));
        if list.len() > 1
            && let Some((flag, Entry { line, .. })) = of_one
        {
            return Err(text.line(
                *line,
                &format!("`{flag}` belongs to one stage; move it below its [[stage]]"),
            ));
        }
        if list.len() > 1
            && let Some(flag) = OF_A_STAGE.iter().find(|flag| given.has(flag))
        {
            return Err(format!(
                "--{flag}: belongs to one stage, and {} has {}; write it into the stage",
                file.display(),
                list.len()
            ));
        }
        let mut read: Vec<Stage> = Vec::new();
        for stage in list {
            let stage = text.stage(stage, &common, &given, read.last())?;
            if let Some(twin) = read.iter().find(|other| other.name == stage.name) {
                let line = stage.lines.get("name").or(stage.lines.get("")).copied().unwrap_or(1);
                return Err(text.line(
                    line,
                    &format!("`name` \"{}\" is another stage's; give each its own", twin.name),
                ));
            }
            read.push(stage);
        }
        Ok(Self { file: file.to_owned(), stages: read })
    }

    /// Does the stages, or goes on with the first that is not finished.
    ///
    /// # Errors
    /// A sentence naming the file, the line and the stage.
    pub(super) fn run(&self, threads: NonZeroUsize) -> Result<(), String> {
        let interrupt = Interrupt::listen()?;
        // What a later stage is refused for is better known now than hours later.
        let mut teacher = None;
        for stage in &self.stages {
            let checked = distill::check(&stage.args, stage.goes_on, &mut teacher);
            checked.map_err(|problem| self.wrong(stage, &problem))?;
        }
        drop(teacher);
        let (mut seconds, mut before) = (0.0, None);
        let dry_run = self.stages[0].args.training.dry_run;
        for (number, stage) in self.stages.iter().enumerate() {
            eprintln!("Stage {} of {}: {}", number + 1, self.stages.len(), stage.name);
            let goes_on = Before { stage: true, network: before.take().filter(|_| stage.goes_on) };
            let ran = distill::stage(&stage.args, threads, &Alone, interrupt.clone(), goes_on);
            let ran = ran.map_err(|problem| self.wrong(stage, &problem))?;
            seconds += ran.estimated_seconds;
            before = Some(ran.network);
        }
        if dry_run {
            let time =
                duration(std::time::Duration::try_from_secs_f64(seconds).unwrap_or_default());
            super::print(format!("All {} stages: {time}. {DRY}", self.stages.len()))?;
        }
        Ok(())
    }

    /// What is wrong with a stage, with the line of the key at fault where the problem begins with a flag.
    fn wrong(&self, stage: &Stage, problem: &str) -> String {
        let plain = problem.trim_start_matches('`');
        let flag = plain
            .strip_prefix("--")
            .map(|rest| rest.split([' ', ':', '`']).next().unwrap_or_default());
        let line = flag.and_then(|flag| stage.lines.get(flag)).or(stage.lines.get(""));
        format!(
            "{}:{}: stage {}: {problem}",
            self.file.display(),
            line.copied().unwrap_or(1),
            stage.name
        )
    }
}

/// Flags that are given on the command line, as words.
struct Given {
    words: Vec<OsString>,
    names: BTreeSet<String>,
}

impl Given {
    fn of(flags: &Command, matches: &ArgMatches) -> Self {
        let (mut words, mut names) = (Vec::new(), BTreeSet::new());
        for arg in flags.get_arguments() {
            let (id, Some(long)) = (arg.get_id().as_str(), arg.get_long()) else { continue };
            // Help and the like are no values.
            let source =
                matches.ids().any(|it| it.as_str() == id).then(|| matches.value_source(id));
            if source.flatten() != Some(ValueSource::CommandLine) {
                continue;
            }
            names.insert(long.to_owned());
            let values: Vec<_> = matches.get_raw(id).into_iter().flatten().collect();
            words.extend(written(&Key::new(arg), &values));
        }
        Self { words, names }
    }

    fn has(&self, flag: &str) -> bool {
        self.names.contains(flag)
    }
}

/// A flag and its values as words of a command line.
fn written(key: &Key, values: &[impl AsRef<OsStr>]) -> Vec<OsString> {
    let flag = OsString::from(format!("--{}", key.arg.get_long().unwrap_or_default()));
    if key.kind == Kind::Switch {
        return vec![flag];
    }
    if recipe_keys::takes_several(&key.arg) {
        let values = values.iter().map(|value| value.as_ref().to_owned());
        return std::iter::once(flag).chain(values).collect();
    }
    // One word, so that a value may begin with a dash.
    let word = |value: &OsStr| {
        let mut word = flag.clone();
        word.push("=");
        word.push(value);
        word
    };
    values.iter().map(|value| word(value.as_ref())).collect()
}

/// A key with its value, as words of a command line, and where it stands.
#[derive(Debug, Clone)]
struct Entry {
    words: Vec<OsString>,
    line: usize,
}

/// A recipe's text, and what its keys are.
struct Text<'a> {
    file: &'a Path,
    text: &'a str,
    flags: Command,
}

impl Text<'_> {
    fn stage(
        &self,
        stage: &Spanned<DeValue<'_>>,
        common: &BTreeMap<String, Entry>,
        given: &Given,
        before: Option<&Stage>,
    ) -> Result<Stage, String> {
        let own_line = self.line_of(stage.span().start);
        let table = stage.get_ref().as_table();
        let table = table.ok_or_else(|| {
            self.line(own_line, "`stage` is a list of tables; begin each with a line [[stage]]")
        })?;
        let (mut entries, mut name) = (common.clone(), None);
        let mut lines: BTreeMap<String, usize> = BTreeMap::new();
        for (key, value) in table {
            let line = self.line_of(key.span().start);
            match key.get_ref().as_ref() {
                "name" => {
                    let text = value.get_ref().as_str().filter(|name| is_id(name));
                    name = Some(text.ok_or_else(|| {
                        self.line(line, "`name` takes a text of letters, digits, `.`, `_` and `-`: the stage's folder; `auto` and `draft` are reserved")
                    })?);
                    lines.insert("name".into(), line);
                }
                key_name => {
                    drop(entries.insert(key_name.to_owned(), self.entry(key, value, true)?))
                }
            }
        }
        let name = name
            .ok_or_else(|| self.line(own_line, "the stage has no `name`, which its folder has"))?;
        lines.extend(entries.iter().map(|(key, entry)| (key.clone(), entry.line)));
        lines.insert(String::new(), own_line);

        let goes_on = before.is_some() && !entries.contains_key("student");
        let mut words = vec![OsString::from("understudy distill")];
        for (key, entry) in &entries {
            if !given.has(key) {
                words.extend(entry.words.iter().cloned());
            }
        }
        words.extend(given.words.iter().cloned());
        if let Some(before) = before.filter(|_| goes_on) {
            let mut word = OsString::from("--student=");
            word.push(&before.args.out);
            words.push(word);
        }
        let matches = self.flags.clone().try_get_matches_from(words);
        let args = matches.and_then(|matches| DistillArgs::from_arg_matches(&matches));
        let mut args =
            args.map_err(|error| self.line(own_line, &format!("stage {name}: {}", told(&error))))?;
        args.out.push(name);
        Ok(Stage { name: name.to_owned(), args, lines, goes_on })
    }

    /// A key and its value, which has to be of the key's kind and in its range.
    fn entry(
        &self,
        key: &Spanned<impl AsRef<str>>,
        value: &Spanned<DeValue<'_>>,
        of_a_stage: bool,
    ) -> Result<Entry, String> {
        let (line, name) = (self.line_of(key.span().start), key.get_ref().as_ref());
        let wrong = |problem: String| self.line(line, &format!("`{name}` {problem}"));
        let key = recipe_keys::key(&self.flags, name, of_a_stage).map_err(wrong)?;
        let values = values(&key.kind, value.get_ref()).ok_or_else(|| {
            let shown = self.text[value.span()].lines().next().unwrap_or_default();
            wrong(format!("is {shown}: it takes {}", key.kind.takes()))
        })?;
        let values: Vec<String> = match PATHS.contains(&name) {
            true => values.into_iter().map(|value| self.beside(value)).collect(),
            false => values,
        };
        if key.kind == Kind::Switch && values == ["false"] {
            return Ok(Entry { words: Vec::new(), line });
        }
        let words = written(&key, &values);
        // The flag's own parser has its say, with this line.
        let alone = Command::new("recipe").no_binary_name(true);
        let alone = alone.arg(key.arg.clone().required(false));
        alone
            .try_get_matches_from(&words)
            .map_err(|error| wrong(format!("does not fit: {}", told(&error))))?;
        Ok(Entry { words, line })
    }

    /// A value that names something beside the recipe is that.
    fn beside(&self, value: String) -> String {
        let found =
            self.file.parent().map(|folder| folder.join(&value)).filter(|path| path.exists());
        found.and_then(|path| path.to_str().map(str::to_owned)).unwrap_or(value)
    }

    fn at(&self, offset: usize, problem: &str) -> String {
        self.line(self.line_of(offset), problem)
    }

    fn line(&self, line: usize, problem: &str) -> String {
        format!("{}:{line}: {problem}", self.file.display())
    }

    fn line_of(&self, offset: usize) -> usize {
        self.text.as_bytes()[..offset.min(self.text.len())]
            .iter()
            .filter(|byte| **byte == b'\n')
            .count()
            + 1
    }
}

/// A value as a flag's words have it; `None` where it is of another kind.
fn values(kind: &Kind, value: &DeValue<'_>) -> Option<Vec<String>> {
    let number = |value: &DeValue<'_>| {
        let whole = value.as_integer()?;
        Some(i128::from_str_radix(whole.as_str(), whole.radix()).ok()?.to_string())
    };
    let text = |value: &DeValue<'_>| value.as_str().map(str::to_owned);
    let one = match kind {
        Kind::Switch => value.as_bool().map(|on| on.to_string()),
        Kind::Whole(_) => number(value),
        Kind::Number => number(value).or_else(|| Some(value.as_float()?.as_str().to_owned())),
        Kind::Word(_) | Kind::Text => text(value),
        Kind::Texts => match value.as_array() {
            Some(list) if !list.is_empty() => {
                return list.iter().map(|value| text(value.get_ref())).collect();
            }
            _ => text(value),
        },
    };
    one.map(|value| vec![value])
}

/// clap's complaint in one line.
fn told(error: &clap::Error) -> String {
    let text = error.to_string();
    let lines = text.lines().map(str::trim).take_while(|line| !line.starts_with("Usage:"));
    let lines = lines.filter(|line| !line.is_empty() && !line.starts_with("For more information"));
    lines.collect::<Vec<_>>().join(" ").trim_start_matches("error: ").to_owned()
}
